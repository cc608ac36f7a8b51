# SPDX-License-Identifier: Apache-2.0
"""Text of a user's own: a fixed part is held out, nothing is in both parts, and the page's commands run."""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.runs import short_recipe
from helpers.stories import END

from training.evaluate import load_model
from training.paths import CLONE
from training.publishing import publish, trials
from training.recipe import load_recipe
from training.tasks import language_modeling
from training.text.sources import load_stories, source_provenance, split_provenance
from training.text.story_writer import write_stories
from training.text.windows import spread_evenly


pytestmark = pytest.mark.usefixtures("own_cache")


def parts(source, fraction=0.1, streaming=False):
    options = {"validation_fraction": fraction, "streaming": streaming}
    return [[row["text"] for row in load_stories(str(source), split=s, **options)] for s in ("train", "validation")]


@pytest.mark.parametrize("streaming", [False, True])
def test_whole_documents_are_held_out_by_their_content(tmp_path, streaming):
    texts = [*write_stories(200, seed=0)] + ["A text that is there twice, in two places."] * 2
    for name, order in (("one", 1), ("two", 2)):
        random.Random(order).shuffle(texts)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.txt").write_text(END.join(texts[:90]))
        (folder / f"{name}.md").write_text(END.join(texts[90:]))
        (folder / "README.md").write_text("about the files")
    train, validation = parts(tmp_path / "one", streaming=streaming)
    assert sorted(train + validation) == sorted(texts) and not {*train} & {*validation}
    share = sum(map(len, validation)) / sum(map(len, texts))
    assert 0.09 < share <= 0.1
    again = parts(tmp_path / "two", streaming=streaming)
    assert [sorted(part) for part in again] == [sorted(train), sorted(validation)]


@pytest.mark.parametrize("count", [1, 3])
def test_of_long_texts_the_end_of_each_is_held_out(tmp_path, count):
    texts = [" ".join(write_stories(40, seed=seed)) for seed in range(count)]
    (tmp_path / "books.txt").write_text(END.join(texts))
    train, validation = parts(tmp_path / "books.txt", 0.05)
    assert len(train) == len(validation) == count
    for text, begin, end in zip(texts, train, validation, strict=True):
        assert text.split() == begin.split() + end.split() and text.startswith(begin) and text.endswith(end)
        assert len(end) == pytest.approx(0.05 * len(text), abs=100)


def test_a_text_without_spaces_is_cut_at_a_character(tmp_path):
    text = "從前有一隻貓" * 200
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (train,), (validation,) = parts(tmp_path / "a.txt", 0.25)
    assert train + validation == text and len(validation) == 300


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("embedded", "train", "'embedded' has splits: leave it out, and name the split"),
        (
            "some/stories",
            "train",
            r"leave it out, and name a part of it as datasets does, such as split='train\[:5%\]'",
        ),
        ("{file}", "test", "of a text with a validation_fraction give 'train' or 'validation'"),
    ],
)
def test_a_part_that_there_is_not_is_refused(tmp_path, source, split, message):
    (tmp_path / "a.txt").write_text("once upon a time")
    source = source.replace("{file}", str(tmp_path / "a.txt"))
    for function in (load_stories, source_provenance):
        with pytest.raises(ValueError, match=message):
            function(source, split=split, num_stories=3, validation_fraction=0.1)


def test_a_validation_text_that_is_trained_on_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("once upon a time")
    (tmp_path / "b.txt").write_text("there was a cat")
    (tmp_path / "copies").mkdir()
    shutil.copy(tmp_path / "a.txt", tmp_path / "copies" / "c.txt")
    file, copies, folder = ({"source": str(tmp_path / name)} for name in ("a.txt", "copies", "."))
    held_out = {"validation_fraction": 0.1}
    embedded, hub = {"source": "embedded", "num_stories": 3}, {"source": "some/stories"}
    validation = {"split": "validation"}
    refused = [
        (file, file | validation),
        (file, copies),
        (folder, file | {"num_stories": 1}),
        (file | held_out, file | validation | {"validation_fraction": 0.2}),
        (file | held_out, file | held_out),
        (file, file | held_out | validation),
        (embedded, embedded | {"num_stories": 9}),
        (hub | {"source": "some/stories@v1"}, hub | {"num_stories": 2}),
    ]
    for train, other in refused:
        with pytest.raises(ValueError, match="is among the training text.*name a text that is not trained on, or"):
            split_provenance(train, other)
    allowed = [
        (file, {"source": str(tmp_path / "b.txt")}),
        (file | held_out, file | held_out | validation),
        (embedded, embedded | validation),
        (hub, hub | validation),
    ]
    for train, other in allowed:
        assert split_provenance(train, other)["validation"] == source_provenance(**other)


def test_a_run_is_refused_and_its_remedy_works(tmp_path, without_clean_process):
    file = tmp_path / "notes.txt"
    file.write_text(END.join(write_stories(30, seed=5)))
    both = [f"data.{split}.source={file}" for split in ("train", "validation")]
    both += ["data.train.num_stories=null", "data.validation.num_stories=null"]
    with pytest.raises(ValueError, match="hold a part out, as the recipe my_text does"):
        language_modeling.run(short_recipe(tmp_path / "a", *both))
    remedy = [f"data.{split}.validation_fraction=0.2" for split in ("train", "validation")]
    recipe = short_recipe(tmp_path / "b", *both, *remedy, "data.num_windows.validation=2", "tokens=512")
    result = language_modeling.run(recipe)
    # On the same windows of the same part, as publishing measures it.
    line = trials.check_loss(result, lambda: load_model(recipe.folder / "model"))
    assert line.startswith("ok: validation_loss measured again")
    assert result["data"]["validation"]["validation_fraction"] == 0.2
    assert result["data"]["validation"]["split"] == "validation"


def test_windows_are_bounded_by_their_number():
    assert spread_evenly(10, 4).tolist() == [0, 3, 6, 9]
    assert spread_evenly(3, 4).tolist() == spread_evenly(3, None).tolist() == [0, 1, 2]
    recipe = load_recipe("my_text")
    assert recipe.data.num_windows.validation == 400 and recipe.data.num_windows.train is None


@pytest.mark.slow
def test_the_pages_commands_train_on_a_text_and_begin_its_description(tmp_path):
    """As they stand there, but for the length of the training and the place of the description."""
    section = (CLONE / "configuration" / "README.md").read_text(encoding="utf-8").split("## Text of your own")[1]
    commands = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].splitlines()
    (tmp_path / "notes.txt").write_text(" ".join(write_stories(1200, seed=1)))
    environment = os.environ | {"PYTHONPATH": str(CLONE), "OMP_NUM_THREADS": "1"}
    short = ["tokens=4_096", "training.logging_steps=1", "data.num_windows.validation=4"]
    for command in commands:
        python, *words = shlex.split(command)
        words += short if words[2] == "run" else ["--max-new-tokens", "4"] if words[2] == "generate" else []
        words += ["--about", "about.yaml"] if words[2] == "publish" else []
        process = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert python == "python" and process.returncode == 0, process.stderr
    run = tmp_path / "runs" / "my_text" / "mosaic-micro-seed0"
    data = json.loads((run / "result.json").read_text(encoding="utf-8"))["data"]
    assert data["train"]["files"] == data["validation"]["files"]
    about = (tmp_path / "about.yaml").read_text(encoding="utf-8")
    assert f'# notes.txt\n    - "{data["train"]["files"]["notes.txt"]}"' in about
    # What is left empty is named, and an earlier file stays.
    with pytest.raises(
        ValueError, match=r"(?s)needs these fields of .*about.yaml.*title.*license.*data.origin.*limits"
    ):
        publish.prepare(run, "someone/notes", about=tmp_path / "about.yaml")
    (tmp_path / "about.yaml").write_text(filled := about.replace('""', "en"), encoding="utf-8")
    with pytest.raises(ValueError, match="exists already and stays as it is"):
        publish.init(run, tmp_path / "about.yaml")
    assert (tmp_path / "about.yaml").read_text(encoding="utf-8") == filled
    assert publish.prepare(run, "someone/notes", about=tmp_path / "about.yaml").about.data.datasets == []
