# SPDX-License-Identifier: Apache-2.0
"""The notebook runs offline from beginning to end, and what is committed of it is small and clean."""

import re
import shutil

import nbformat
from nbclient import NotebookClient

from training.paths import CLONE


NOTEBOOK = CLONE / "hub_cards" / "notebook" / "first_steps.ipynb"


def printed(notebook):
    """Return what each code cell has printed, to both streams."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


def test_every_cell_runs_on_a_model_where_make_demo_puts_its_own(run, tmp_path, monkeypatch):
    shutil.copytree(run / "model", tmp_path / "runs/demo/mosaic-demo-seed0/model")
    folder = tmp_path / "hub_cards" / "notebook"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(CLONE))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing is to be installed
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    text = "\n".join(printed(notebook))
    assert "as if it had never been there, to the bit: True" in text
    assert float(re.search("largest difference of a logit: (.*)", text)[1]) < 1e-3
    losses = [float(loss) for loss in re.findall(r"step +\d+: (.*) nats", text)]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True)
    assert "lily.txt" in text and "contextual" in text and "Warning" not in text


def test_what_is_committed_is_small_and_without_a_trace_of_a_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 40_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {(output.output_type, output.get("name")) for output in outputs} <= {("stream", "stdout")}
    assert not re.search(r"site-packages|/home/|/root/|/tmp/|/Users/", NOTEBOOK.read_text(encoding="utf-8"))
