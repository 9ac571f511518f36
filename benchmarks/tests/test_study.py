"""Contract under test: the study trains what its configuration says, measures what it names, and resumes."""

import json

import numpy as np
import pytest
import torch

for needed in ("matplotlib", "fontTools", "PIL", "tqdm", "pytopk"):
    pytest.importorskip(needed, reason=f"the study needs {needed}, which the package itself does not")

from benchmarks.study import jobs  # noqa: E402
from benchmarks.study.losses import LOSSES  # noqa: E402
from examples import evaluation, tasks, training  # noqa: E402
from examples.data_sets import kanji  # noqa: E402
from examples.data_sets.dataset import Dataset  # noqa: E402
from examples.losses import BALANCED, EPS, OPTIMIZER  # noqa: E402


@pytest.fixture
def tiny(monkeypatch):
    """Twelve clusters in 8 dimensions, which all jobs get as their data: 2, 6 or 20 training rows of a class."""
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
    task = tasks.Task("species", 12, torch.cat(inputs), parts)
    monkeypatch.setattr(jobs, "load", lambda name, cache: task)
    return task


def make_job(loss, **changes):
    """A short run under settings in the middle of their bounds."""
    middle = {name: (low * high) ** 0.5 for name, (low, high) in (OPTIMIZER | LOSSES[loss].space).items()}
    job = {"stage": "trial", "data": "species", "loss": loss, "settings": middle | {"lr": 1e-2, "eps": 1e-8}, "seed": 1}
    return job | {"epochs": 40, "batch": 32, "keep_by": "macro top-5"} | changes


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_and_is_measured(tiny, loss):
    record = jobs.run(make_job(loss), None)
    assert record["top-5"] > 0.8  # by chance 5 / 12
    assert record["top-1"] <= record["top-5"] <= record["top-10"] <= record["top-20"] == 1
    assert set(record) >= {"macro top-1", "macro top-5", "few", "medium", "many", "epoch"}


def test_a_seed_fixes_a_run(tiny):
    job = make_job(BALANCED, epochs=3)
    assert jobs.run(job, None) == jobs.run(job, None) != jobs.run(job | {"seed": 2}, None)


def test_a_seed_has_the_same_batches_and_first_weights_under_all_losses(tiny, monkeypatch):
    """Also under losses that draw noise, and under cosine heads, whose rows are drawn by another law."""
    seen, take_steps, make_model = [], training.take_steps, training.make_model

    def recorded_steps(loss_of, *args):
        return take_steps(lambda rows: seen.append(rows.tolist()) or loss_of(rows), *args)

    def recorded_model(*args):
        model = make_model(*args)
        seen.append([p.tolist() for p in model[0].parameters()])
        return model

    monkeypatch.setattr(training, "take_steps", recorded_steps)
    monkeypatch.setattr(training, "make_model", recorded_model)
    runs = []
    for loss in ("cross-entropy", "sampled, B = 16", "LDAM"):
        seen.clear()
        jobs.run(make_job(loss, epochs=3), None)
        runs.append(list(seen))
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) > 3


def test_a_run_with_sgd_is_another_one_and_learns(tiny):
    with_adam = make_job("cross-entropy")
    common = {name: with_adam["settings"][name] for name in ("weight_decay", "lr")}
    with_sgd = jobs.run(with_adam | {"settings": common | {"weight_decay": 1e-4, "momentum": 0.9}}, None)
    assert with_sgd["top-5"] > 0.8 and with_sgd["epoch"] != jobs.run(with_adam, None)["epoch"]


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if loss.cosine])
def test_rows_of_cosine_heads_start_at_the_length_asked_for(tiny, loss):
    torch.manual_seed(0)
    for length in (None, 3.0):
        settings = make_job(loss)["settings"] | ({} if length is None else {"length": length})
        rows = training.make_model(tiny, LOSSES[loss], settings)[-1].weight.norm(dim=1)
        assert torch.allclose(rows, torch.tensor(length or 1.0))


def test_the_offset_favours_frequent_classes_in_training_only():
    offset = LOSSES["sampled, B = 16, offset"].make({"tau": 2.0}, [1, 9]).offset
    assert torch.allclose(offset, 2 * torch.tensor([0.1, 0.9]).log())


def test_the_best_epoch_on_validation_rows_is_kept(monkeypatch, tiny):
    """The measures of the epochs are given; the weights must be those of the second."""
    given, weights = iter([0.2, 0.7, 0.7, 0.1]), []

    def measure(model, task, part):
        assert part == "val" and not model.training
        weights.append(model[-1].weight.detach().clone())
        return {"macro top-5": next(given)}

    monkeypatch.setattr(training, "measure", measure)
    job = make_job("cross-entropy", epochs=4)
    how = (job[name] for name in ("settings", "seed", "epochs", "batch", "keep_by"))
    model, found = training.fit_best_epoch(tiny, LOSSES["cross-entropy"], *how)
    assert found == {"macro top-5": 0.7, "epoch": 2}
    assert torch.equal(model[-1].weight, weights[1]) and not torch.equal(weights[1], weights[2])
    assert not model.training


def test_measure_counts_by_rows_by_classes_and_by_shots():
    inputs = torch.eye(8)[:, :8] * 2 + torch.linspace(1, 0, 8)  # class 0 scores high everywhere
    train = torch.tensor([0] * 20 + [1] * 5 + [2])
    test = torch.tensor([0, 0, 0, 1, 2])
    wrong = torch.tensor([0, 0, 7, 1, 7])  # inputs of the test rows: two are another class's
    parts = {"train": (train, train), "test": (wrong, test), "frequent": (wrong[:3], test[:3])}
    task, model = tasks.Task("x", 8, inputs, parts), torch.nn.Identity()
    result = evaluation.measure(model, task, "test")
    assert result["top-1"] == pytest.approx(3 / 5)
    assert result["macro top-1"] == pytest.approx((2 / 3 + 1 + 0) / 3, abs=1e-5)
    assert result["few"] == 1.0 and result["many"] == 1.0 and result["medium"] == 1.0
    assert evaluation.measure(model, task, "frequent")["few"] is None  # no such row


@pytest.mark.parametrize("score", [torch.nan, 0.0], ids=["diverged", "collapsed"])
def test_a_model_that_tells_nothing_apart_has_no_hits(score):
    train = torch.arange(8)
    task = tasks.Task("x", 8, torch.full((8, 8), score), {"train": (train, train)})
    assert evaluation.measure(torch.nn.Identity(), task, "train")["top-5"] == 0


def test_only_the_final_runs_see_test_rows(monkeypatch, tiny):
    seen = []
    measured = {"macro top-5": 0.5}
    for module in (jobs, training):
        monkeypatch.setattr(module, "measure", lambda model, task, part: seen.append(part) or measured)
    for stage, parts in (("trial", {"val"}), ("ablation of k", {"val"}), ("test", {"val", "test"})):
        seen.clear()
        jobs.run(make_job("cross-entropy", epochs=1, stage=stage), None)
        assert set(seen) == parts


def test_jobs_follow_from_the_best_trial_and_are_not_repeated():
    plan = jobs.PLANS["features"]
    first = jobs.jobs("features", [])
    assert {job["stage"] for job in first} == {"trial"} and len(first) == len(plan.losses) * plan.trials * 2
    assert [("eps" in job["settings"], "momentum" in job["settings"]) for job in first[: 2 * plan.trials]] == [
        *[(True, False)] * plan.trials,
        *[(False, True)] * plan.trials,
    ]
    assert jobs.ablation_jobs([]) == []
    done = [job | {plan.keep_by: place / 1000} for place, job in enumerate(first)]
    assert jobs.left_of(jobs.jobs("features", done[:3]), done[:3]) == first[3:]
    done += done[:5] + [done[0] | {"epochs": 1}]  # repeated, and of an older plan
    second = jobs.left_of(jobs.jobs("features", done), done)
    assert {job["stage"] for job in second} == {"second trial"} and len(second) == len(plan.losses) * jobs.SECOND_TRIALS
    best = {trial["loss"]: trial["settings"] for trial in first}  # the last trial of a loss is its best here
    for job in second:
        settings, around, space = job["settings"], best[job["loss"]], LOSSES[job["loss"]].space
        assert all(0.49 < settings[name] / around[name] < 2.05 for name in OPTIMIZER)
        assert all(low <= settings[key] <= high for key, (low, high) in space.items())
        assert all(settings[key] == around[key] for key in around.keys() - OPTIMIZER.keys() - space.keys())
    lower = [job | {plan.keep_by: 0.0} for job in second]
    higher = [job | {plan.keep_by: 1.0 + place} for place, job in enumerate(second)]
    best_second = {trial["loss"]: trial["settings"] for trial in second}
    for found, chosen in ((lower, best), (higher, best_second)):  # the same optimizer is best for all
        tests = jobs.left_of(jobs.jobs("features", done + found), done + found)
        assert {job["stage"] for job in tests} == {"test"} and len(tests) == len(plan.losses) * len(jobs.SEEDS)
        assert all(job["settings"] == chosen[job["loss"]] for job in tests)
    # One loss is best with another optimizer, which the others try with their own settings, if they have any.
    found = [job | {plan.keep_by: 2.0 * (job["loss"] == "LDAM")} for job in second]
    third = [job for job in jobs.left_of(jobs.jobs("features", done + found), done + found) if job["stage"] != "test"]
    assert {job["stage"] for job in third} == {"third trial"}
    assert {job["loss"] for job in third} == {loss for loss in plan.losses if LOSSES[loss].space}
    found += [job | {plan.keep_by: 3.0} for job in third]
    last = jobs.left_of(jobs.jobs("features", done + found), done + found)
    assert {job["stage"] for job in last} == {"test"} and {job["loss"] for job in last} == {*plan.losses}
    chosen = {job["loss"]: job["settings"] for job in last}
    assert all(chosen[job["loss"]] == job["settings"] for job in third)
    done += higher
    ablations = [job for job in jobs.ablation_jobs(done) if job["stage"] == "ablation of epsilon"]
    assert {job["settings"]["epsilon"] for job in ablations if job["loss"] == BALANCED} == set(
        jobs.ABLATIONS[BALANCED]["epsilon"]
    )
    assert not any("momentum" in job["settings"] for job in jobs.ablation_jobs(done))
    assert jobs.left_of(jobs.jobs("features", done), done + tests) == []
    assert all(job["stage"] == "trial" for job in jobs.jobs("glyphs", done))


def test_third_trials_have_the_optimizers_of_the_other_losses():
    chosen = {
        "a": {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-8, "epsilon": 3.0},
        "b": {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.9},
        "c": {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.9, "tau": 0.5},
    }
    sgd, adam = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.9}, {"lr": 0.1, "weight_decay": 0.2, "eps": 1e-8}
    assert jobs.settings_shared(chosen, {loss: [] for loss in chosen}) == {  # the optimizer of most losses first
        "a": [sgd | {"epsilon": 3.0}, adam | {"epsilon": 3.0}],
        "b": [sgd, adam],
        "c": [sgd | {"tau": 0.5}, adam | {"tau": 0.5}],
    }
    assert jobs.settings_shared(chosen, {"a": [], "b": [sgd], "c": [sgd, adam]})["b"] == [adam]
    many = {str(i): {"lr": float(i), "weight_decay": 0.1, "eps": 1e-8} for i in range(20)}
    found = jobs.settings_shared(many, {loss: [many[loss]] for loss in many})
    assert all(len(points) == jobs.THIRD_TRIALS and many[loss] not in points for loss, points in found.items())


@pytest.mark.parametrize("loss", LOSSES)
def test_settings_are_drawn_inside_their_bounds_and_again_the_same(loss):
    drawn, space = jobs.settings_of(loss, "kanji", "AdamW"), OPTIMIZER | LOSSES[loss].space
    assert drawn == jobs.settings_of(loss, "kanji", "AdamW")
    assert all(low <= point[key] <= high for point in drawn for key, (low, high) in space.items())
    assert [point["eps"] for point in drawn] == [*EPS] * 3  # each as often


@pytest.mark.parametrize("data", jobs.PLANS)
def test_all_losses_get_the_same_optimizers(data):
    trials = jobs.jobs(data, [])
    common = [
        [tuple(map(j["settings"].get, ("lr", "weight_decay", "eps", "momentum"))) for j in trials if j["loss"] == loss]
        for loss in jobs.PLANS[data].losses
    ]
    n_trials = jobs.PLANS[data].trials * len(jobs.PLANS[data].optimizers)
    assert all(points == common[0] for points in common) and len(set(common[0])) == n_trials


def test_a_line_that_was_cut_off_is_run_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert jobs.records(tmp_path, tmp_path / "none.json") == [{"a": 1}, {"a": 2}]


def test_the_study_resumes_from_what_was_collected(tmp_path, tiny, capsys):
    first = jobs.jobs("kanji", [])
    made = [job | {"top-5": 0.5, "commit": "abc", "date": "2026-01-01"} for job in first[:7]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    jobs.collect(tmp_path, tmp_path, tmp_path / "study.json")
    assert f"kanji: at least {len(first) - 7} runs are missing" in capsys.readouterr().out
    (tmp_path / "a.jsonl").unlink()
    found = jobs.records(tmp_path, tmp_path / "study.json")
    assert found == made and jobs.left_of(jobs.jobs("kanji", found), found) == first[7:]
    assert not json.loads((tmp_path / "study.json").read_text())["data"]["kanji"]["complete"]


def test_species_parts_share_no_input_and_no_class_is_new(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 9, (1200, 300), dtype=np.uint8)
    group, target = rng.integers(0, 1200, 2000), rng.integers(0, 150, 2000)
    data = Dataset(np.arange(150).astype(str), inputs, group, target)
    monkeypatch.setattr(tasks.species, "load", lambda cache: data)
    tasks.load.cache_clear()
    made = tasks.load("species", tmp_path)
    groups = [set(made.parts[part][0].tolist()) for part in ("train", "val", "test")]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert made.count().min() >= 1 and made.inputs.shape == (1200, tasks.COMPONENTS)
    # Each (input, class) is one of the data's, under the classes' new numbers.
    old = np.unique(target[np.isin(group, list(groups[0]))])
    pairs = set(zip(group.tolist(), target.tolist()))
    for rows, label in made.parts.values():
        assert set(zip(rows.tolist(), old[label].tolist())) <= pairs


@pytest.fixture
def drawings(monkeypatch, tmp_path):
    """60 characters with 4 to 11 drawings, some in two fonts; each image is of one grey that tells it."""
    monkeypatch.setattr(tasks, "distort", lambda images, seed: images)
    count = np.arange(60) % 8 + 4
    group = np.arange(count.sum())
    images = np.zeros((len(group), 784), np.uint8)
    images[:, 0], images[:, 1] = group % 250, group // 250
    target = np.repeat(np.arange(60), count)
    twice = np.concatenate([np.arange(len(group)), np.arange(0, len(group), 3)])  # a drawing in two fonts: one row more
    data = Dataset(np.arange(60).astype(str), images, group[twice], target[twice])
    monkeypatch.setattr(tasks.glyphs, "load", lambda cache: data)

    tasks.load.cache_clear()

    def load(name):
        made = tasks.load(name, tmp_path)
        pixels = (made.inputs.flatten(1)[:, :2] * 255).round().long()
        return made, pixels[:, 0] + 250 * pixels[:, 1]

    return load


def test_pretraining_sees_other_characters(drawings, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(tasks, "_pretrained", lambda images: seen.append(images) or torch.nn.Flatten())
    made, drawing = drawings("features")[0], drawings("long-tailed glyphs")[1]
    pixels = (seen[0].flatten(2)[..., :2] * 255).round().long()
    assert len(seen[0]) == made.classes and made.inputs.shape[1] == 28 * 28
    assert not set((pixels[..., 0] + 250 * pixels[..., 1]).flatten().tolist()) & set(drawing.tolist())


@pytest.mark.parametrize("name", [name for name in tasks.NAMES if "glyphs" in name])
def test_no_drawing_is_in_two_parts(drawings, name):
    made, drawing = drawings(name)
    seen = {part: set(drawing[rows].tolist()) for part, (rows, _) in made.parts.items()}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["val"] or seen["val"] & seen["test"])
    assert made.classes == 14  # every second one of those with 8 drawings or more
    for part in ("val", "test"):
        assert len(made.parts[part][1]) == 14 * tasks.DRAWINGS[part]


def test_labels_are_wrong_in_training_only(drawings):
    right, wrong = drawings("glyphs")[0], drawings("noisy glyphs")[0]
    changed = (right.parts["train"][1] != wrong.parts["train"][1]).float().mean()
    assert 0.2 < changed < 0.6  # 0.4 on average
    assert all(torch.equal(right.parts[part][1], wrong.parts[part][1]) for part in ("val", "test"))


def test_wrong_labels_stay_in_their_group():
    label = torch.arange(52).repeat(400)
    noisy = tasks.wrong_labels(label, 52, 0)
    assert (noisy // tasks.GROUP == label // tasks.GROUP).all()
    share = float((noisy != label)[label < 50].float().mean())  # a redrawn label may be the old one
    assert share == pytest.approx(tasks.WRONG * (1 - 1 / tasks.GROUP), abs=0.02)


def test_the_tail_falls_from_all_images_to_one():
    classes, most = 100, tasks.DRAWINGS["train"] * tasks.VARIANTS
    label = torch.arange(classes).repeat_interleave(tasks.DRAWINGS["train"]).repeat(tasks.VARIANTS)
    count = label[tasks._kept("long-tailed glyphs", label, classes)].bincount(minlength=classes)
    assert count.max() == most and count.min() == 1
    expected = (most ** (1 - torch.arange(classes) / (classes - 1))).round()
    assert torch.equal(count.sort(descending=True).values, expected.long())
    kept = tasks._kept("glyphs", label, classes)
    assert (label[kept].bincount() == tasks.DRAWINGS["train"] * tasks.KEPT).all()


def test_distortions_move_ink_but_keep_it():
    image = torch.zeros(50, 1, 28, 28)
    image[:, :, 12:16, 8:20] = 1
    moved = tasks.distort(image, 0)
    assert not torch.equal(moved, image) and torch.equal(moved, tasks.distort(image, 0))
    assert not torch.equal(moved[0], moved[1])
    ink = moved.sum((1, 2, 3)) / image.sum((1, 2, 3))
    assert (ink > 0.7).all() and (ink < 1.4).all()  # a scale of 0.9 to 1.1, twice


def test_unknown_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the task must be one of"):
        tasks.load("digits", tmp_path)


def test_a_reading_is_cut_into_kana_and_back():
    for reading in ("かいぎ", "コーヒー", "ぁゖヴ"):
        codes = kanji.encode(reading)
        assert codes.dtype == np.uint8 and codes.shape == (kanji.LENGTH,)
        assert kanji.decode(codes) == reading.translate(kanji.TO_HIRAGANA)
    assert len(set(kanji.encode("ぁぃぅーゖ").tolist())) == 6  # and 0, which is no kana
    assert kanji.encode("かいぎC") is None and kanji.decode(kanji.encode("あ" * 20)) == "あ" * kanji.LENGTH


def test_words_of_two_kanji_are_read_from_the_dictionary():
    text = """会議 [かいぎ] /(n) meeting/
会議 [カイギ] /(n) the same reading/
懐疑 [かいぎ] /(n) doubt/
会 [かい] /(n) one kanji/
会う [あう] /(v5u) kana in the word/
会議室 [かいぎしつ] /(n) three kanji/
議会 [ぎかい(P)] /(n) another character in the reading/
議事 [ぎじ] /(n) proceedings/
"""
    data = kanji.parse(text)
    rows = {(kanji.decode(data.inputs[g]), data.classes[t]) for g, t in zip(data.group, data.target)}
    assert rows == {("かいぎ", "会"), ("かいぎ", "懐"), ("ぎじ", "議")} and len(data.target) == 3
    assert data.ambiguous_share() == pytest.approx(2 / 3)
