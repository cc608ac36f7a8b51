# SPDX-License-Identifier: Apache-2.0
"""Cards: every number is one of the result, every field is filled, and the data that were read are described."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
import yaml
from helpers.payload import PAYLOAD
from helpers.publications import ABOUT_SMOKE, prepare
from huggingface_hub import ModelCard

from modeling_memory_mosaic.inspection_memory_mosaic import measure_units
from training.card import ABOUT, PAPERS, TEMPLATES, load_about, model_metadata
from training.evaluate import load_model
from training.paths import CONFIGURATION, RESULTS
from training.publishing.folder import read_sums
from training.result import write_result
from training.tables import results_table


def test_a_card_says_what_its_result_says(staged):
    result = json.loads((staged / "result.json").read_text(encoding="utf-8"))
    units = json.loads((staged / "units.json").read_text(encoding="utf-8"))
    card = ModelCard.load(staged / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and card.data.language == "en"
    assert card.data.eval_results is None  # the Hub's index knows data sets on the Hub only
    assert results_table([result]) in card.text
    for number in (result["parameters"], result["tokens"], result["steps"], units["tokens"]):
        assert f"{number:,}" in card.text
    for row in units["layers"]:
        assert f"| {row['layer']} | {row['kind']} |" in card.text and f"{row['effective_pairs']:.1f}" in card.text
    for version in result["versions"].values():
        assert f"| {version} |" in card.text
    listed = dict(map(reversed, re.findall(r"^([0-9a-f]{64})  (.+)$", card.text, flags=re.MULTILINE)))
    assert listed.items() <= read_sums(staged).items() and len(listed) == len(PAYLOAD) + 4
    assert "No baseline was trained by this recipe" in card.text


# By the kind of card: the type of model whose paper it names and cites, if any, and words that it has to have.
CARDS = {
    "mosaic": ("memory_mosaic", "with 134 learnt pairs each."),
    "mosaic v2": ("memory_mosaic_v2", "the last 7 tokens and 2 long-term memories of all tokens 4 or more before"),
    "adapter": ("memory_mosaic", "`persistent_memory.slot_values`."),
    "merged": ("memory_mosaic", "fine-tuned by LoRA, with the adapters merged."),
    "memory": ("memory_mosaic", "41 key-value pairs in each head"),
    "memory of v2": ("memory_mosaic_v2", "key-value pairs in each long-term head, from 1 text that"),
    "stories": ("memory_mosaic", "2 stories for small children"),
    "automata": (None, "3 random automata"),
}
# Headings in their order; those of a card without them are left out.
ORDER = ("Use", "Results", "Statistics", "Limits", "More ways to use it", "Training", "Licence", "Citation")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "mosaic" else pytest.mark.slow) for kind in CARDS]
)
def test_a_card_begins_with_a_picture_and_five_lines_and_ends_with_checksums(folder_of, kind):
    folder = folder_of(kind)
    text = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).text
    picture = re.search(r"!\[.+?\]\((\S+\.png)\)", text)
    assert (folder / picture[1]).read_bytes().startswith(b"\x89PNG")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[0] == "Use" and picture.start() < text.index("## Use")
    assert [name for name in headings if name in ORDER] == [name for name in ORDER if name in headings]
    first = re.search(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)[1]
    lines = [line for line in first.splitlines() if line and not line.startswith(("from ", "import "))]
    assert len(lines) <= 5 and text.index(first) < text.index("\n## ", text.index("## Use") + 1)
    assert headings[-1] == "Check the files"
    used, checked = text.split("## Check the files")
    assert not re.search(r"\b[0-9a-f]{64}\b", used) and re.search(r"\b[0-9a-f]{64}\b", checked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CARDS)
def test_a_card_names_its_own_paper(folder_of, kind):
    card, (model_type, words) = ModelCard.load(folder_of(kind) / "README.md", ignore_metadata_errors=True), CARDS[kind]
    assert words in card.text
    named = {tag for tag in card.data.tags if tag.startswith("arxiv:")}
    assert named == ({f"arxiv:{PAPERS[model_type].arxiv}"} if model_type else set())
    cited = "".join(re.search(r"```bibtex\n(.*?)```", card.text, flags=re.DOTALL)[1])
    if model_type:
        paper = PAPERS[model_type]
        assert f"eprint = {{{paper.arxiv}}}" in cited and f"author = {{{paper.authors}}}" in cited
    for other in {paper.arxiv for paper in PAPERS.values()} - {model_type and PAPERS[model_type].arxiv, "2405.06394"}:
        assert other not in card.text


@pytest.mark.parametrize("kind", [kind for kind, (model_type, _) in CARDS.items() if model_type and kind != "stories"])
def test_results_stand_beside_baselines(folder_of, kind):
    """A card without a baseline says so."""
    folder = folder_of(kind)
    text = ModelCard.load(folder / "README.md").text
    results = text[text.index("## Results") : text.index("## Limits")]
    if kind in ("adapter", "merged"):
        assert "| the base | 0 |" in results
    elif kind.startswith("memory"):
        recall = json.loads((folder / "result.json").read_text(encoding="utf-8"))["recall"]
        for way, words in (("behind", "behind this memory"), ("alone", "behind nothing")):
            assert f"| {words} | {recall['loss'][way]:.4f} |" in results
        assert ("without that text" in results) == (recall["num_texts"] > 1)
    else:
        assert "No baseline was trained by this recipe" in results


def test_units_of_a_v2_model_are_numbers_or_nothing(folder_of):
    folder = folder_of("mosaic v2")
    units = json.loads((folder / "units.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [row["effective_pairs"] is None for row in units["layers"]] == [False, True] * 2
    assert "nan" not in ModelCard.load(folder / "README.md").text


def test_answers_of_all_models_of_a_recipe_are_on_the_card(run, about):
    publication = prepare(run, about)
    metrics = publication.result["metrics"] | {"answer_accuracy": 0.75, "num_answers": 1200}
    publication = dataclasses.replace(publication, result=publication.result | {"metrics": metrics})
    folder = run / "published" / "model"
    text = publication.artifact.card(publication, folder, "0" * 40)
    assert "(1,200 of them)" in text and "| mosaic-smoke | 0 | 75.0 % |" in text


def test_the_models_index_has_the_results_metrics():
    result = json.loads((RESULTS / "stories_tiny" / "mosaic-tiny--seed0.json").read_text())
    about = load_about("stories_tiny")
    card = ModelCard(f"---\n{model_metadata(result, about)}\n---\n")
    stated = {evaluation.metric_type: evaluation.metric_value for evaluation in card.data.eval_results}
    metrics = result["metrics"]
    assert stated == {name: metrics[f"validation_{name}"] for name in ("loss", "perplexity", "bits_per_byte")}
    assert {evaluation.dataset_type for evaluation in card.data.eval_results} == {"roneneldan/TinyStories"}


def test_units_of_a_padded_batch_are_those_of_the_texts(staged):
    model, tokenizer = load_model(staged)
    texts = ["Once upon a time", "A dog ran to the big red house and saw a cat"]
    together = measure_units(model, tokenizer, texts)
    apart = [measure_units(model, tokenizer, [text]) for text in texts]
    assert together["tokens"] == sum(part["tokens"] for part in apart)
    assert len(together["layers"]) == 2 * model.config.num_hidden_layers
    leak = 10 * model.model.layers[1].persistent_memory.key_leak.detach().abs().double()
    half_life = next(r for r in together["layers"] if (r["layer"], r["kind"]) == (1, "persistent"))["half_life"]
    torch.testing.assert_close(torch.tensor(half_life).double(), math.log(2) / leak)
    for row, first, second in zip(together["layers"], *(part["layers"] for part in apart), strict=True):
        low, high = sorted((first["effective_pairs"], second["effective_pairs"]))
        assert low <= row["effective_pairs"] <= high


def test_data_that_are_not_described_are_refused(run, tmp_path):
    fields = json.loads(json.dumps(ABOUT_SMOKE))
    fields["data"]["sources"] = ["roneneldan/TinyStories"]
    path = tmp_path / "about.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(ValueError, match="train data are embedded .*say nothing"):
        prepare(run, path)
    result = json.loads((run / "result.json").read_text())
    result["data"]["train"] |= {"kind": "files", "name": "embedded", "files": {"embedded": "f" * 64}}
    shutil.copytree(run, tmp_path / "run")
    write_result(result, tmp_path / "run")
    path.write_text(yaml.safe_dump(ABOUT_SMOKE), encoding="utf-8")  # a file may be called anything
    with pytest.raises(ValueError, match=f"train data are {'f' * 64}"):
        prepare(tmp_path / "run", path)


@pytest.mark.parametrize("field", ["title", "license", "language", "purpose", "limits", "data.license", "data.origin"])
@pytest.mark.parametrize("way", ["empty", "missing"])
def test_an_empty_field_of_a_card_is_named(run, tmp_path, field, way):
    fields = json.loads(json.dumps(ABOUT_SMOKE))
    *section, name = field.split(".")
    place = fields[section[0]] if section else fields
    place[name] = ""
    if way == "missing":
        del place[name]
    path = tmp_path / "about.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"needs these fields of .*about.yaml:\n  {re.escape(field)}: "):
        prepare(run, path)


def test_a_recipe_without_a_description_is_refused(run):
    with pytest.raises(ValueError, match="write it in .*smoke.yaml"):
        prepare(run, None)


@pytest.mark.parametrize("path", sorted(ABOUT.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_description_of_a_recipe_is_whole(path):
    load_about(path.stem)
    assert (CONFIGURATION / "recipe" / path.name).is_file()


def test_every_snippet_is_in_a_card():
    templates = "\n".join(path.read_text(encoding="utf-8") for path in TEMPLATES.rglob("*.jinja"))
    snippets = {path.name for path in (TEMPLATES / "snippets").glob("*.py")}
    assert snippets == set(re.findall(r'"snippets/(\w+\.py)"', templates))
