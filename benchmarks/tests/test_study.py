"""Contract under test: the study trains what its configuration says, measures what it names, and resumes."""

import json

import numpy as np
import pytest
import torch

for needed in ("torchmetrics", "matplotlib", "fontTools", "PIL", "tqdm", "pytopk"):
    pytest.importorskip(needed, reason=f"the study needs {needed}, which the package itself does not")

from benchmarks import ROOT, study  # noqa: E402
from benchmarks.study import data as study_data  # noqa: E402
from benchmarks.study import jobs, runs  # noqa: E402
from examples.data_sets.dataset import Dataset  # noqa: E402
from examples.trials import draw_points  # noqa: E402

CONFIG = json.loads((ROOT / "benchmarks" / "study" / "config.json").read_text())


@pytest.fixture
def tiny():
    """Twelve clusters in 8 dimensions: 2, 6 or 20 training rows of a class."""
    generator = torch.Generator().manual_seed(0)
    centre = 3 * torch.randn(12, 8, generator=generator)
    count = torch.tensor([2, 6, 20]).repeat(4)
    parts, inputs, start = {}, [], 0
    for part, target in (
        ("train", torch.arange(12).repeat_interleave(count)),
        ("val", torch.arange(12).repeat(3)),
        ("test", torch.arange(12).repeat(5)),
    ):
        inputs.append(centre[target] + torch.randn(len(target), 8, generator=generator))
        parts[part] = torch.arange(start, start + len(target)), target
        start += len(target)
    return study_data.Data("species", 12, torch.cat(inputs), parts)


SETTINGS = {
    "cross-entropy": {},
    "focal": {"gamma": 1.0},
    "LDAM": {"max_m": 0.2, "s": 10.0},
    "logit-adjusted": {"tau": 1.0},
    "smooth top-K SVM": {"tau": 1.0},
    study.BALANCED: {"epsilon": 0.5},
    study.IMBALANCED: {"epsilon": 0.05, "max_m": 0.2},
}


@pytest.mark.parametrize("loss", SETTINGS)
def test_a_run_learns_and_is_measured(monkeypatch, tiny, loss):
    monkeypatch.setattr(runs, "data_set", lambda name, cache: tiny)
    settings = SETTINGS[loss] | {"lr": 1e-2, "weight_decay": 1e-3, "k": 2, "n_sample": 5}
    job = {"stage": "test", "data": "species", "loss": loss, "settings": settings, "seed": 1, "epochs": 60, "batch": 32}
    record = runs.run(job, None)
    assert record["top-5"] > 0.8  # by chance 5 / 12
    assert record["top-1"] <= record["top-5"] <= record["top-10"] <= record["top-20"] == 1
    assert runs.run(job, None) | {"seconds an epoch": 0} == record | {"seconds an epoch": 0}  # a seed fixes a run
    assert set(record) >= {"macro top-1", "macro top-5", "few", "medium", "many", "seconds an epoch"}


def test_measure_counts_by_rows_by_classes_and_by_shots():
    inputs = torch.eye(8)[:, :8] * 2 + torch.linspace(1, 0, 8)  # class 0 scores high everywhere
    train = torch.tensor([0] * 20 + [1] * 5 + [2])
    test = torch.tensor([0, 0, 0, 1, 2])
    data = study_data.Data("x", 8, inputs, {"train": (train, train)})
    model = torch.nn.Identity()
    wrong = torch.tensor([0, 0, 7, 1, 7])  # inputs of the test rows: two are another class's
    result = runs.measure(model, data, wrong, test)
    assert result["top-1"] == pytest.approx(3 / 5)
    assert result["macro top-1"] == pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-5)
    assert result["few"] == 1.0 and result["many"] == 1.0 and result["medium"] == 1.0
    assert runs.measure(model, data, wrong[:3], test[:3])["few"] is None  # no such row


@pytest.mark.parametrize("score", [torch.nan, 0.0], ids=["diverged", "collapsed"])
def test_a_model_that_tells_nothing_apart_has_no_hits(score):
    train = torch.arange(8)
    data = study_data.Data("x", 8, torch.full((8, 8), score), {"train": (train, train)})
    assert runs.measure(torch.nn.Identity(), data, train, train)["top-5"] == 0


@pytest.mark.parametrize("stage, part", [("trial", "val"), ("test", "test"), ("ablation of k", "val")])
def test_only_the_final_runs_see_test_rows(monkeypatch, tiny, stage, part):
    monkeypatch.setattr(runs, "data_set", lambda name, cache: tiny)
    seen = []
    monkeypatch.setattr(runs, "measure", lambda model, data, rows, target: seen.append(rows) or {})
    settings = {"lr": 1e-2, "weight_decay": 1e-3}
    job = {"stage": stage, "data": "species", "loss": "cross-entropy", "settings": settings, "seed": 1, "epochs": 1}
    runs.run(job | {"batch": 32}, None)
    assert torch.equal(seen[0], tiny.parts[part][0])


def test_jobs_follow_from_the_best_trial_and_are_not_repeated():
    first, left = jobs.jobs(CONFIG, "species", [])
    assert left == first and {job["stage"] for job in first} == {"trial"}
    assert len(first) == len(CONFIG["losses"]) * CONFIG["data"]["species"]["trials"]
    done = [job | {CONFIG["criterion"]: place / 1000} for place, job in enumerate(first)]
    assert jobs.jobs(CONFIG, "species", done[:3])[1] == first[3:]
    wanted, left = jobs.jobs(CONFIG, "species", done + done[:5] + [done[0] | {"epochs": 1}])  # repeated, and of old
    tests = [job for job in left if job["stage"] == "test"]
    assert len(tests) == len(CONFIG["losses"]) * len(CONFIG["seeds"])
    for job in tests:  # the last trial of a loss is its best here
        assert job["settings"] == [t for t in first if t["loss"] == job["loss"]][-1]["settings"]
    ablations = [job for job in left if job["stage"] == "ablation of epsilon"]
    assert {job["settings"]["epsilon"] for job in ablations if job["loss"] == study.BALANCED} == set(
        CONFIG["ablations"][study.BALANCED]["epsilon"]
    )
    assert jobs.jobs(CONFIG, "species", done + left) == (wanted, [])
    assert all(job["stage"] == "trial" for job in jobs.jobs(CONFIG, "glyphs", done)[0])


def test_settings_are_drawn_inside_their_ranges_and_again_the_same():
    space = CONFIG["optimizer"] | CONFIG["losses"]["LDAM"]
    drawn = draw_points(space, 8, 0)
    assert drawn == draw_points(space, 8, 0) and drawn[:5] == draw_points(space, 5, 0)
    assert all(space[key][0] <= value <= space[key][1] for point in drawn for key, value in point.items())


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert jobs.records(tmp_path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("data", CONFIG["data"])
def test_all_losses_get_the_same_learning_rates_and_decays(data):
    trials = jobs.jobs(CONFIG, data, [])[0]
    common = [
        [(j["settings"]["lr"], j["settings"]["weight_decay"]) for j in trials if j["loss"] == loss]
        for loss in CONFIG["losses"]
    ]
    assert all(points == common[0] for points in common) and len(set(common[0])) == CONFIG["data"][data]["trials"]


def test_collecting_is_refused_while_runs_are_missing(tmp_path):
    with pytest.raises(SystemExit, match="runs are missing, 56 at least"):
        jobs.collect(CONFIG, tmp_path, tmp_path, tmp_path / "study.json")


def test_species_parts_share_no_input_and_no_class_is_new(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 9, (1200, 300), dtype=np.uint8)
    group, target = rng.integers(0, 1200, 2000), rng.integers(0, 150, 2000)
    data = Dataset("species", [str(i) for i in range(150)], inputs, group, target)
    monkeypatch.setattr(study_data.species, "load", lambda cache: data)
    made = study_data.load("species", tmp_path)
    groups = [set(made.parts[part][0].tolist()) for part in ("train", "val", "test")]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert made.count().min() >= 1 and made.inputs.shape == (1200, study_data.COMPONENTS)
    # Each (input, class) is one of the data's, under the classes' new numbers.
    old = np.unique(target[np.isin(group, list(groups[0]))])
    pairs = set(zip(group.tolist(), target.tolist()))
    for rows, label in made.parts.values():
        assert set(zip(rows.tolist(), old[label].tolist())) <= pairs


@pytest.fixture
def drawings(monkeypatch, tmp_path):
    """60 characters with 4 to 11 drawings, some in two fonts; each image is of one grey that tells it."""
    monkeypatch.setattr(study_data, "distort", lambda images, seed: images)
    count = np.arange(60) % 8 + 4
    group = np.arange(count.sum())
    images = np.zeros((len(group), 784), np.uint8)
    images[:, 0], images[:, 1] = group % 250, group // 250
    target = np.repeat(np.arange(60), count)
    twice = np.concatenate([np.arange(len(group)), np.arange(0, len(group), 3)])  # a drawing in two fonts: one row more
    data = Dataset("glyphs", [str(i) for i in range(60)], images, group[twice], target[twice])
    monkeypatch.setattr(study_data.glyphs, "load", lambda cache: data)

    def load(name):
        made = study_data.load(name, tmp_path)
        pixels = (made.inputs.flatten(1)[:, :2] * 255).round().long()
        return made, pixels[:, 0] + 250 * pixels[:, 1]

    return load


@pytest.mark.parametrize("name", study_data.NAMES[1:])
def test_no_drawing_is_in_two_parts(drawings, name):
    made, drawing = drawings(name)
    seen = {part: set(drawing[rows].tolist()) for part, (rows, _) in made.parts.items()}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["val"] or seen["val"] & seen["test"])
    assert made.classes == 28  # those with 8 drawings or more
    for part in ("val", "test"):
        assert len(made.parts[part][1]) == 28 * study_data.DRAWINGS[part]


def test_labels_are_wrong_in_training_and_validation_alone(drawings):
    right, wrong = drawings("glyphs")[0], drawings("noisy glyphs")[0]
    for part in ("train", "val"):
        changed = (right.parts[part][1] != wrong.parts[part][1]).float().mean()
        assert 0.2 < changed < 0.6  # 0.4 on average
    assert torch.equal(right.parts["test"][1], wrong.parts["test"][1])


def test_wrong_labels_stay_in_their_group():
    label = torch.arange(52).repeat(400)
    noisy = study_data.wrong_labels(label, 52, 0)
    assert (noisy // study_data.GROUP == label // study_data.GROUP).all()
    share = float((noisy != label)[label < 50].float().mean())  # a redrawn label may be the old one
    assert share == pytest.approx(study_data.WRONG * (1 - 1 / study_data.GROUP), abs=0.02)


def test_the_tail_falls_from_all_images_to_one():
    classes, most = 100, study_data.DRAWINGS["train"] * study_data.VARIANTS
    label = torch.arange(classes).repeat_interleave(study_data.DRAWINGS["train"]).repeat(study_data.VARIANTS)
    count = label[study_data._kept("long-tailed glyphs", label, classes)].bincount(minlength=classes)
    assert count.max() == most and count.min() == 1
    expected = (most ** (1 - torch.arange(classes) / (classes - 1))).round()
    assert torch.equal(count.sort(descending=True).values, expected.long())
    kept = study_data._kept("glyphs", label, classes)
    assert (label[kept].bincount() == study_data.DRAWINGS["train"] * study_data.KEPT).all()


def test_distortions_move_ink_but_keep_it():
    image = torch.zeros(50, 1, 28, 28)
    image[:, :, 12:16, 8:20] = 1
    moved = study_data.distort(image, 0)
    assert not torch.equal(moved, image) and torch.equal(moved, study_data.distort(image, 0))
    assert not torch.equal(moved[0], moved[1])
    ink = moved.sum((1, 2, 3)) / image.sum((1, 2, 3))
    assert (ink > 0.7).all() and (ink < 1.4).all()  # a scale of 0.9 to 1.1, twice


def test_unknown_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data must be one of"):
        study_data.load("digits", tmp_path)
