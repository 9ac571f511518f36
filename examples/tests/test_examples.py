"""Contract under test: the demo reads, labels, cuts, splits, renders and measures as its docstrings say.

No network: the tests write the databases they read.
"""

import json
import os
import random
import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "fontTools", "PIL", "tqdm"):
    pytest.importorskip(needed, reason=f"the demo needs {needed}, which the package itself does not")


from examples import all_species, demo, evaluation, losses, report, tasks, training  # noqa: E402
from examples.data_sets import glyphs, kanji, species  # noqa: E402
from examples.data_sets.blastdb import IUPAC, BlastDatabase  # noqa: E402
from examples.data_sets.dataset import Dataset, cached, shuffle_within_classes  # noqa: E402
from examples.data_sets.debian import PackageUnavailable  # noqa: E402

FORWARD, REVERSE = "CAGCAGCCGCGGTAA", "ATTAGATACCCTGGT"


def bases(n, seed=0):
    return "".join(random.Random(seed).choices("ACGT", k=n))


def pack(sequence, wide):
    """A sequence's bytes in .nsq: the packed bases, then the ambiguous stretches (`wide`: in two words each)."""
    code = ["ACGT".find(base) % 4 for base in sequence]  # an ambiguous base is packed as T
    tail = len(code) % 4
    code += [0] * (4 - tail)  # a multiple of four ends in a byte of no bases
    packed = bytearray(a << 6 | b << 4 | c << 2 | d for a, b, c, d in zip(*[iter(code)] * 4))
    packed[-1] |= tail
    words, at = [], 0
    while at < len(sequence):
        end = at + 1
        if sequence[at] not in "ACGT":
            while end < len(sequence) and sequence[end] == sequence[at] and end - at < 16:
                end += 1
            letter = IUPAC.index(sequence[at])
            words += [letter << 28 | (end - at - 1) << 16, at] if wide else [letter << 28 | (end - at - 1) << 24 | at]
        at = end
    listed = struct.pack(f">{len(words) + 1}I", len(words) | wide << 31, *words) if words else b""
    return bytes(packed), listed


def write_database(path, records, wide=False, version=4):
    headers, packed = b"", b"\0"
    offsets = [[], [], []]
    for title, sequence in records:
        size = len(title)
        length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
        first, second = pack(sequence, wide)
        for table, at in zip(offsets, (len(headers), len(packed), len(packed) + len(first))):
            table.append(at)
        headers += b"\x30\x80\xa0\x80\x1a" + length + title.encode() + b"\0\0"
        packed += first + second
    for table, at in zip(offsets, (len(headers), len(packed), len(packed))):
        table.append(at)
    index = struct.pack(">2i", version, 0)
    for text in (b"a title", b"a date"):
        index += struct.pack(">i", len(text)) + text
    index += struct.pack(">iqi", len(records), sum(len(s) for _, s in records), max(len(s) for _, s in records))
    index += np.array(offsets, ">u4").tobytes()
    for end, content in ((".nin", index), (".nhr", headers), (".nsq", packed)):
        Path(f"{path}{end}").write_bytes(content)
    return path


@pytest.mark.parametrize("wide", [False, True], ids=["one word a stretch", "two words a stretch"])
def test_database_round_trip(tmp_path, wide):
    records = [(f"gb|X{n}| title {n}", bases(n, n)) for n in range(1, 10)]  # every filling of the last byte
    long_title = "gb|Y| long " + "t" * 300
    records += [(long_title, bases(7) + "N" * 40 + bases(9) + "RYK" + bases(2))]
    database = BlastDatabase(write_database(tmp_path / "db", records, wide))
    assert len(database) == len(records)
    assert [(database.title(i), database.sequence(i)) for i in range(len(database))] == records


def test_database_of_another_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got version 5"):
        BlastDatabase(write_database(tmp_path / "db", [("gb|X| a", "ACGT")], version=5))


def test_truncated_index_is_refused(tmp_path):
    index = Path(f"{write_database(tmp_path / 'db', [('gb|X| a', 'ACGT')])}.nin")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes for 1 records"):
        BlastDatabase(tmp_path / "db")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("gb|X| Bacillus anthracis 16S ribosomal RNA gene", "Bacillus anthracis"),
        ("gb|X| Anabaena flos-aquae partial 16S rRNA gene, strain 1", "Anabaena flos-aquae"),
        ("gb|X| Vibrio cholerae", "Vibrio cholerae"),
        ("gb|X| Streptomyces sp. A1 16S ribosomal RNA gene", None),
        ("gb|X| Uncultured bacterium clone 3 16S ribosomal RNA gene", None),
        ("gb|X| Flavobacteriaceae bacterium 16S ribosomal RNA gene", None),
        ("gb|X| Candidatus pelagibacter 16S ribosomal RNA gene", None),
        ("gb|X| Swine manure clone 16S ribosomal RNA gene", None),
        ("gb|X| Euglena gracilis chloroplast 16S ribosomal RNA gene", None),
        ("gb|X| Olavius loisae endosymbiont 16S ribosomal RNA gene", None),
        ("gb|X| uncultured bacillus anthracis", None),
    ],
)
def test_species_of_a_title(title, name):
    assert species.species_of(title) == name


def test_v4_keeps_ambiguities_between_the_primers():
    region = bases(100, 1) + "NRY" + bases(100, 2)
    assert species.v4_region(bases(50, 3) + FORWARD + region + REVERSE + bases(50, 4)) == region


def test_v4_ends_at_the_first_reverse_primer():
    region = bases(200, 1)
    assert species.v4_region(FORWARD + region + REVERSE + bases(50, 2) + REVERSE) == region


@pytest.mark.parametrize(
    ("forward", "reverse", "length", "found"),
    [
        ("CAGCCGCCGCGGTAA", "ATTAGAAACCCCAGT", 250, True),  # M = C, W = A, B = C, D = A
        ("CAGCAGCCGCGGTAA", "ATTAGATACCCGTGT", 250, True),  # M = A, W = T, B = G, D = T
        ("CAGCGGCCGCGGTAA", REVERSE, 250, False),  # M is no G
        (FORWARD, "ATTAGATACCCAGGT", 250, False),  # B is no A
        (FORWARD, "ATTAGATACCCTCGT", 250, False),  # D is no C
        (FORWARD, REVERSE, 149, False),
        (FORWARD, REVERSE, 150, True),
        (FORWARD, REVERSE, 600, True),
        (FORWARD, REVERSE, 601, False),
    ],
)
def test_v4_primers_and_lengths(forward, reverse, length, found):
    region = bases(length, 5)
    assert species.v4_region(f"A{forward}{region}{reverse}A") == (region if found else None)


def test_kmer_counts_skip_ambiguous_bases():
    sequence = bases(300, 6) + "N" + bases(300, 7) + "AAAAAAAAAA"
    expected = np.zeros(4**6, int)
    for i in range(len(sequence) - 5):
        if "N" not in sequence[i : i + 6]:
            expected[int(sequence[i : i + 6].translate(str.maketrans("ACGT", "0123")), 4)] += 1
    assert expected[0] >= 5
    np.testing.assert_array_equal(species.kmer_counts(sequence), expected)


def gene(region):
    return bases(20, 8) + FORWARD + region + REVERSE + bases(20, 9)


def test_parse_keeps_species_with_enough_v4_regions(tmp_path):
    shared, own = bases(250, 10), bases(250, 11)
    records = [(f"gb|A{i}| Bacillus cereus strain {i} 16S", gene(shared)) for i in range(4)]
    records += [(f"gb|B{i}| Bacillus anthracis 16S", gene(shared if i else own)) for i in range(5)]
    records += [(f"gb|C{i}| Vibrio cholerae 16S", gene(own)) for i in range(3)]  # one too few
    records += [("gb|D| Vibrio cholerae 16S", bases(300, 12))]  # no primers, so still too few
    records += [(f"gb|E{i}| Uncultured bacterium 16S", gene(own)) for i in range(9)]
    data = species.parse(write_database(tmp_path / "db", records))
    assert data.classes.tolist() == ["Bacillus anthracis", "Bacillus cereus"]
    assert np.bincount(data.target).tolist() == [5, 4]
    assert data.inputs.shape == (2, 4096)
    expected = [species.kmer_counts(region) for region in [shared] * 4 + [own] + [shared] * 4]
    np.testing.assert_array_equal(data.inputs[data.group], expected)
    assert data.ambiguous_share() == pytest.approx(8 / 9)


def test_another_package_is_refused(tmp_path):
    (tmp_path / "ncbi-rrna-data_0_all.deb").write_bytes(b"not the package")
    with pytest.raises(PackageUnavailable, match="--data kanji"):
        species.load(tmp_path)


def test_missing_apt_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PackageUnavailable, match=r"apt-get is not installed(.|\n)*--data kanji"):
        species.load(tmp_path)


def test_rows_are_shuffled_within_their_classes():
    target = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [1, 5, 20, 30]))
    order, rank = shuffle_within_classes(target, seed=1)
    np.testing.assert_array_equal(target[order], np.sort(target))
    np.testing.assert_array_equal(rank, np.concatenate([np.arange(n) for n in (1, 5, 20, 30)]))
    assert len(set(order.tolist())) == len(target)
    assert (np.diff(order[target[order] == 3]) < 0).any()  # not in the order of the rows


def small_data():
    """30 classes of 8 rows; the first two share all their inputs."""
    target = np.repeat(np.arange(30), 8)
    group = np.where(target == 1, 0, target) * 8 + np.arange(240) % 8
    pattern = np.random.default_rng(0).integers(0, 50, (30, 1, 32))
    noise = np.random.default_rng(1).integers(0, 5, (30, 8, 32))
    return Dataset(np.arange(30).astype(str), (pattern + noise).reshape(240, 32).astype(np.uint8), group, target)


def whole_data():
    """31 species in 931 rows, each species a cluster of inputs."""
    rng = np.random.default_rng(0)
    centre = rng.integers(0, 40, (31, 4096))
    target = np.sort(np.concatenate([np.arange(31), rng.integers(0, 31, 900)]))
    inputs = (centre[target] + rng.integers(0, 3, (len(target), 4096))).astype(np.uint8)
    return Dataset(np.arange(31).astype(str), inputs, np.arange(len(target)), target)


def test_cache_is_built_once_and_loads_the_same(tmp_path):
    data = small_data()
    built = cached(tmp_path / "sub" / "small.npz", lambda: data)
    loaded = cached(tmp_path / "sub" / "small.npz", lambda: pytest.fail("built twice"))
    for read in (built, loaded):
        for field, expected in vars(data).items():
            np.testing.assert_array_equal(getattr(read, field), expected)
    assert loaded.ambiguous_share() == pytest.approx(16 / 240)
    torch.testing.assert_close(loaded.features().square().sum(1), torch.full((240,), 32.0))


def test_glyphs_of_two_fonts():
    fonts = [f for f in glyphs.matplotlib_fonts() if f.name in ("DejaVuSansDisplay.ttf", "STIXSizOneSymReg.ttf")]
    data = glyphs.render(fonts, min_fonts=1)
    both = glyphs.render(fonts, min_fonts=2)
    assert len(fonts) == 2
    assert "N-ARY SUMMATION" in both.classes
    assert set(both.classes) < set(data.classes)
    assert (np.bincount(both.target) == 2).all()
    assert data.inputs.shape == (len(np.unique(data.group)), 28 * 28)
    assert data.inputs.any(axis=1).all()


def test_the_same_image_is_one_input():
    mono = [f for f in glyphs.matplotlib_fonts() if f.name == "DejaVuSansMono.ttf"]
    data = glyphs.render(mono, min_fonts=1)
    latin, greek, other = (
        data.group[data.target == data.classes.tolist().index(name)].tolist()
        for name in ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA", "LATIN CAPITAL LETTER B")
    )
    assert latin == greek != other


def test_a_curve_counts_ranks():
    rank = torch.tensor([0, 0, 1, 3, 30])
    assert evaluation.curve(rank, 4) == [0.4, 0.6, 0.6, 0.8]


def test_steps_visit_all_rows_in_each_epoch_and_stop_when_no_loss_is_asked_for():
    weights = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr) for weight, lr in zip(weights, (1.0, 0.5))]
    seen = []

    def loss_of(rows):
        seen.append(rows.tolist())
        return (weights[0] + weights[1]).sum() + len(rows)

    torch.manual_seed(0)
    losses = list(islice(training.take_steps(loss_of, 10, 4, optimizers), 7))
    epochs = [sum(seen[:3], []), sum(seen[3:6], [])]
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2, 4]
    assert epochs[0] != epochs[1] and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert losses[:3] == [4, 4 - 4.5, 2 - 9]  # each step takes 1.5 from each of three sums
    assert (weights[0] == -7).all() and (weights[1] == -3.5).all()


SETTINGS = {"lr": 1e-2, "weight_decay": 1e-3, "eps": 1e-8, "scale": 16.0, "epsilon": 0.5}


def write_study(path, data):
    """A result of the study in which every loss of the demo has SETTINGS."""
    runs = [{"stage": "trial", "data": data, "loss": name, "settings": {}} for name in losses.LOSSES]
    runs += [{"stage": "test", "data": data, "loss": name, "settings": SETTINGS} for name in losses.LOSSES]
    path.write_text(json.dumps({"runs": runs}))


def kanji_data():
    """30 kanji of twelve readings each, which begin alike, and the readings of which two kanji are right."""
    words, rng = [], np.random.default_rng(0)
    for i in range(30):
        endings = rng.integers(ord("か"), ord("ん"), (12, 3))
        words += [f"{chr(0x4E00 + i)}会 [{chr(ord('あ') + 2 * i)}{''.join(map(chr, end))}] /x/" for end in endings]
    words += [f"{chr(0x4E00 + i)}会 [{reading}] /x/" for i in (0, 1) for reading in demo.ASKED["kanji"]]
    return kanji.parse("\n".join(words))


@pytest.fixture
def run_demo(monkeypatch, tmp_path):
    """Run the demo's command line on small data; what it wrote as JSON."""
    monkeypatch.setattr(kanji, "load", lambda cache: kanji_data())
    monkeypatch.setattr(species, "load", lambda cache, **options: whole_data())
    monkeypatch.setattr(losses, "STUDY", tmp_path / "study.json")
    write_study(tmp_path / "study.json", "kanji")
    tasks.load.cache_clear()

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path), "--cache", str(tmp_path), *options])
        demo.main()
        return json.loads((tmp_path / "demo.json").read_text())

    return run


def test_the_demo_reports_every_loss_and_draws(run_demo, tmp_path, capsys):
    result = run_demo("--epochs", "30")
    assert list(result["losses"]) == list(losses.LOSSES)
    for name, measured in result["losses"].items():
        assert 0.4 < measured["top-5"] == measured["curve"][4] <= 1, name  # by chance 5 of 30
        assert measured["top-1"] == measured["curve"][0] <= measured["top-5"]
    for guesses in result["guesses"].values():
        assert 1 <= len(guesses) <= demo.SHOWN and set(guesses) <= set(demo.ASKED["kanji"])
        assert all(len(five) == 5 for five in guesses.values())
    assert set(result["head"]["losses"]) == {"cross-entropy", "sampled"}
    assert "MiB a step" in (tmp_path / "demo.svg").read_text()
    printed = capsys.readouterr()
    assert "macro top-5" in printed.out and "*" in printed.out
    assert "\r" not in printed.err and len(printed.err) < 1000  # no bar floods a log


def test_right_guesses_are_starred():
    """A model whose scores are its input: classes 2 and 4 are right for input 1."""
    parts = {"test": (torch.tensor([0, 1, 1]), torch.tensor([0, 2, 4]))}
    task = tasks.Task("kanji", 6, torch.tensor([[0.0] * 6, [1, 2, 6, 5, 4, 3]]), parts, tuple("abcdef"))
    assert demo.five_guesses(torch.nn.Identity(), task, 1) == ["*c*", "d", "*e*", "f", "b"]


def test_table_marks_what_is_missing():
    text = report.table({"a": {"one": 0.5, "a longer name": None}, "bcd": {"one": 1.0, "a longer name": 0.123}})
    assert text.splitlines() == [
        "        one  a longer name",
        "a      50.0              -",
        "bcd   100.0           12.3",
    ]


def run_all_species(folder, name, *arguments, processes=None):
    """What a run of the example wrote; with ``processes``, as torchrun starts it."""
    out = folder / f"{name}.json"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = (run if processes else [sys.executable]) + ["-m", all_species.__name__, *arguments]
    command += ["--cache", str(folder), "--out", str(out), "--epochs", "2"]
    environment = os.environ | {"PYTHONPATH": str(all_species.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_all_species_in_one_process_and_in_two(tmp_path):
    """All losses learn; classes over two processes give the losses of one, except for the rounding of their sums."""
    cached(tmp_path / "species_whole.npz", whole_data)
    both, printed = run_all_species(tmp_path, "both")
    for name, row in both["losses"].items():
        assert row["top-5"] > 0.3 and row["losses"][-1] < row["losses"][0], name  # by chance 5 of 31
        assert len(row["losses"]) == 6 and min(row["ms a step"], row["MiB a step"]) > 0 and name in printed
    options = ("--losses", "sampled", "topk", "--sampler", "dense")
    one, _ = run_all_species(tmp_path, "one", *options)
    two, _ = run_all_species(tmp_path, "two", *options, processes=2)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("sampled", "topk"):
        ours, theirs = (run["losses"][name] for run in (one, two))
        torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=1e-3, atol=1e-4)
        assert ours["top-1"] == theirs["top-1"]
