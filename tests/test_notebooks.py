"""`raychain.run` in a notebook and in a trial of a user's Ray Tune."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raychain.events import StageStarted, Step
from raychain.reporting import progress
from raychain.reporting.notebook import NotebookView

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "notebook.md"
CELLS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


class Display:
    """IPython's display, remembered."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def display(self, content: dict[str, str], **options: Any) -> Display:
        assert options == {"raw": True, "display_id": True}
        return self.update(content)

    def update(self, content: dict[str, str], **_: Any) -> Display:
        self.shown.append(content)
        return self


def test_a_cell_has_one_output_that_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    display = Display()
    monkeypatch.setattr(progress, "notebook_view", lambda: NotebookView(display))
    started = StageStarted(0, "small", 10**6, 100, 0, 32, 320, 1)
    step = Step(0, 50, 1600, 5.0, 2.5, 2.5, None, 0.0, 1e-3, {}, 100.0, 0.0, 1)
    with progress.Progress(["small", "<b>large"]) as shown:
        shown.dispatch(started)
        shown.dispatch(step)
        assert 'value="0.5000"' in display.shown[-1]["text/html"]
        assert "loss 2.50" in display.shown[-1]["text/plain"]
        shown.dispatch(StageStarted(1, "<b>large", 10**6, 100, 0, 32, 320, 1))
    assert "<progress" not in display.shown[-1]["text/html"], "nothing is under way at the end"
    assert "&lt;b&gt;large" in display.shown[-1]["text/html"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.long
def test_the_notebook_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells}
    shown = [out for out in outputs['run = raychain.run("mine.yaml")'] if out.output_type == "display_data"]
    assert len(shown) == 1, "one output, which changed in place"
    assert "stage 2/2 CoM-micro-M: trained" in shown[0].data["text/plain"]
    (again,) = (outs for line, outs in outputs.items() if line.startswith('print(run["status"]'))
    assert "succeeded ['reused', 'reused']" in again[-1].text
    (page,) = outputs['IFrame(raychain.report("runs/mine"), "100%", 600)']
    assert 'src="runs/mine/report.html"' in page.data["text/html"]
    assert (tmp_path / "runs/mine/report.html").exists()
    assert "top1" in outputs['print(measured["results"][0]["metrics"])'][0].text
    assert "parameters" in notebook.cells[-1].outputs[-1].text


@pytest.mark.long
def test_chains_train_in_the_trials_of_a_users_tune(ray_session: None, tree: dict[str, Any], tmp_path: Path) -> None:
    from ray import tune

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))

    def trial(config: dict[str, float]) -> None:
        import raychain

        rate = config["lr"]
        run = raychain.run(
            str(tmp_path / "mine.yaml"), overrides=(f"train.lr={rate}",), out=str(tmp_path / f"runs/lr-{rate}")
        )
        tune.report({"top1": run["stages"][-1]["metrics"]["zero_shot_top1"]})

    results = tune.Tuner(
        trial,
        param_space={"lr": tune.grid_search([1e-3, 5e-4])},
        tune_config=tune.TuneConfig(metric="top1", mode="max"),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert not results.errors
    assert len(results) == 2
    for rate in (1e-3, 5e-4):
        record = json.loads((tmp_path / f"runs/lr-{rate}/run.json").read_text())
        assert record["status"] == "succeeded"


def test_a_terminal_with_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    from raychain.reporting.notebook import notebook_view

    for shell in (None, SimpleNamespace()):
        module = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython.core.getipython", module)
        assert notebook_view() is None
