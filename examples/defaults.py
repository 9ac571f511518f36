"""The settings of the demo, and the classes whose guesses it prints."""

from training import BALANCED, CROSS_ENTROPY, IMBALANCED, Settings

# Each is the best of 16 trials on validation rows. `demo.py --tune --out benchmarks/results` wrote the trials to
# benchmarks/results/demo_tuning.json.
SPECIES = {
    CROSS_ENTROPY: Settings(lr=0.0011, weight_decay=0.84),
    BALANCED: Settings(lr=0.0024, weight_decay=0.008, epsilon=1.2),
    IMBALANCED: Settings(lr=0.011, weight_decay=0.36, epsilon=0.016, max_m=0.08),
}
# These are the species' settings; no hyper-parameter search was run on the glyphs.
GLYPHS = SPECIES
DEFAULTS = {"species": SPECIES, "glyphs": GLYPHS}
# The demo takes about three minutes with either; the glyphs have three times the rows and four times the classes.
EPOCHS = {"species": 30, "glyphs": 4}
WELL_KNOWN = {
    "species": (
        "Escherichia coli",
        "Salmonella enterica",
        "Yersinia pestis",
        "Vibrio cholerae",
        "Pseudomonas aeruginosa",
        "Helicobacter pylori",
        "Bacillus anthracis",
        "Staphylococcus aureus",
        "Lactobacillus casei",
        "Mycobacterium tuberculosis",
    ),
    "glyphs": (
        "LATIN CAPITAL LETTER A",
        "GREEK CAPITAL LETTER ALPHA",
        "LATIN SMALL LETTER O",
        "DIGIT ZERO",
        "LATIN SMALL LETTER L",
        "GREEK CAPITAL LETTER SIGMA",
        "N-ARY SUMMATION",
        "CYRILLIC CAPITAL LETTER ZHE",
    ),
}
