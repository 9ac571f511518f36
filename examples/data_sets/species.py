"""Species names and the V4 region of 16S rRNA genes, from the Debian package `ncbi-rrna-data`.

The records are GenBank's (NCBI), the selection is SILVA SSURef release 93; Debian's copyright file says public domain.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .blastdb import IUPAC, BlastDatabase
from .dataset import Dataset, cached
from .debian import Package

PACKAGE = Package(
    "ncbi-rrna-data",
    "6.1.20170106+dfsg1-10 (Debian 12)",
    "6a66c1c170eb5a3f1b7d806ad7787fb57ee0a9db26a488b90bc722c440ad327f",
    otherwise="; or use --data kanji",
)
DATABASE = "SSURef_93.fasta"
MIN_ROWS = 4  # a species needs one row in each part of the split, and a second one for training
KMER = 6

FORWARD_515F = "CAGCMGCCGCGGTAA"
REVERSE_806R = "ATTAGAWACCCBDGT"  # its reverse complement, without the last bases

# Records of a sample, a host or a group read like names too. The lists were completed by reading all names with
# enough rows. `NOT_NAMED` applies to the whole title, since organelles and symbionts carry their host's name.
NOT_GENUS = set(
    """Agricultural Anoxic Antarctic Arctic Bacterial Bacterium Bacteroidales Bermuda Blackwater Bovine
    Candidate Coconut Drinking Enrichment Environmental Filamentous Flavescence Glacial Gram Halophilic
    Human Hydrothermal Lachnospiraceae Lethal Magnetic Marine Mouse Mucus Napier Nebraska Oryza Phototrophic
    Pigeon Polar Poultry Psychrophilic Rainbow Rape Soil Sugarcane Sweet Swine Termite Thermal Thiotrophic
    Uncultivated Unidentified Unknown""".split()
)
NOT_EPITHET = set(
    """archaeon bacterium clone division from genomospecies group metagenome oral organism proteobacterium soil
    species strain taxon""".split()
)
NOT_NAMED = re.compile(
    "uncultured|candidatus|chloroplast|plastid|mitochondri|cyanelle|symbiont|epibiont|consortium|phytoplasma|yellows",
    re.IGNORECASE,
)
NAME = re.compile(r"\|\s*([A-Z][a-z]+) ([a-z]{2}[a-z-]*[a-z])(?=[\s,;]|$)")


def load(cache: Path, whole: bool = False) -> Dataset:
    """The data set from `cache`, which is downloaded and parsed on first use.

    Args:
        whole: Whether to take every named species and the whole gene, not only the V4 region and species with enough
            rows.
    """

    def build() -> Dataset:
        with PACKAGE.unpacked(cache) as files:
            return parse(next(files.rglob(f"{DATABASE}.nin")).with_suffix(""), whole)

    return cached(cache / ("species_whole.npz" if whole else "species.npz"), build)


def parse(database: Path, whole: bool = False) -> Dataset:
    """Keeps the records that have a species name and a V4 region, and the species with enough of them.

    With `whole`, every record that has a species name is kept.
    """
    records = BlastDatabase(database)
    rows = []
    for i in tqdm(range(len(records)), "reading 16S genes", unit="gene", disable=None):
        name = species_of(records.title(i))
        region = (records.sequence(i) if whole else v4_region(records.sequence(i))) if name else None
        if region:
            rows.append((name, region))
    count = Counter(name for name, _ in rows)
    rows = [row for row in rows if count[row[0]] >= (1 if whole else MIN_ROWS)]
    classes, target = np.unique([name for name, _ in rows], return_inverse=True)
    regions, group = np.unique([region for _, region in rows], return_inverse=True)
    inputs = np.stack(
        [kmer_counts(region) for region in tqdm(regions, f"counting {KMER}-mers", unit="gene", disable=None)]
    )
    return Dataset(classes, inputs, group, target)


def species_of(title: str) -> str | None:
    """`Genus epithet` of a record's title, or None for records of samples, groups, organelles and symbionts."""
    match = NAME.search(title)
    if not match or match[1] in NOT_GENUS or match[2] in NOT_EPITHET or NOT_NAMED.search(title):
        return None
    return f"{match[1]} {match[2]}"


def _pattern(primer: str) -> str:
    choices = ("".join(b for i, b in enumerate("ACGT") if IUPAC.index(code) >> i & 1) for code in primer)
    return "".join(f"[{c}]" for c in choices)


_V4 = re.compile(f"{_pattern(FORWARD_515F)}([A-Z]{{150,600}}?){_pattern(REVERSE_806R)}")


def v4_region(sequence: str) -> str | None:
    """The 150 to 600 bases between the primers 515F and 806R; None if they are not found."""
    match = _V4.search(sequence)
    return match and match[1]


_CODE = np.full(256, -(4**KMER), np.int64)  # any k-mer over an ambiguous base comes out negative
_CODE[np.frombuffer(b"ACGT", np.uint8)] = range(4)


def kmer_counts(sequence: str) -> np.ndarray:
    """The number of occurrences of each k-mer of A, C, G, T, in alphabetical order: [4^k] uint8, at most 255."""
    code = _CODE[np.frombuffer(sequence.encode(), np.uint8)]
    kmers = sum(code[i : len(code) - KMER + 1 + i] << 2 * (KMER - 1 - i) for i in range(KMER))
    return np.bincount(kmers[kmers >= 0], minlength=4**KMER).clip(max=255).astype(np.uint8)
