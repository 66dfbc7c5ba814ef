"""The examples for CI: an action that passes exit codes on, a workflow that fits it, a policy that the gate reads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2quant.eval.gating.policy import read_policy
from places import ROOT

FOLDER = ROOT / "examples" / "ci"

STUB = """#!/bin/bash
printf '%s\\n' "$@" > "$STUB_ARGUMENTS"
exit "$STUB_STATUS"
"""


def load(name: str) -> dict[str, Any]:
    """Return one of the YAML files."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return content


def steps(name: str) -> list[dict[str, Any]]:
    """Return the steps of the action or of the workflow's job."""
    content = load(name)
    found: list[dict[str, Any]] = (content["runs"] if "runs" in content else content["jobs"]["accuracy"])["steps"]
    return found


class Action:
    """The action's gate as GitHub runs it, with a stub in place of k2quant."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stub = folder / "bin" / "k2quant"
        stub.parent.mkdir()
        stub.write_text(STUB)
        stub.chmod(0o755)
        (folder / "script.sh").write_text(next(step for step in steps("action.yml") if step.get("id") == "gate")["run"])

    def run(self, status: int = 0, *, installed: bool = True, **inputs: str) -> subprocess.CompletedProcess[str]:
        """Run it with these inputs; what is not named has its default."""
        step = next(step for step in steps("action.yml") if step.get("id") == "gate")
        defaults = {name: facts.get("default", "") for name, facts in load("action.yml")["inputs"].items()}
        environment = {
            variable: (defaults | inputs)[re.fullmatch(r"\$\{\{ inputs\.(\w+) \}\}", value)[1]]  # type: ignore[index]
            for variable, value in step["env"].items()
        }
        environment |= {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin" if installed else "/usr/bin:/bin",
            "GITHUB_OUTPUT": str(self.folder / "output"),
            "STUB_ARGUMENTS": str(self.folder / "arguments"),
            "STUB_STATUS": str(status),
        }
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(self.folder / "script.sh")]
        return subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=60
        )

    @property
    def arguments(self) -> list[str]:
        """What k2quant was called with."""
        return (self.folder / "arguments").read_text().splitlines()

    @property
    def outputs(self) -> dict[str, str]:
        """What the action tells later steps."""
        return dict(line.split("=", 1) for line in (self.folder / "output").read_text().splitlines())


@pytest.fixture
def action(tmp_path: Path) -> Action:
    """Return the action, ready to run."""
    return Action(tmp_path)


@pytest.mark.parametrize(
    ("status", "verdict"), [(0, "PASS"), (3, "FAIL"), (4, "INCONCLUSIVE"), (1, "ERROR"), (2, "ERROR"), (137, "ERROR")]
)
def test_the_action_ends_as_the_gate_ends(action: Action, status: int, verdict: str) -> None:
    """The gate's exit code is the step's, and the outputs are written whatever it is."""
    done = action.run(status, baseline="base", candidate="candidate")
    assert done.returncode == status, done.stderr
    assert action.outputs == {"verdict": verdict, "report": "gate/gate.html", "junit": "gate/gate.xml"}


def test_all_inputs_reach_the_gate(action: Action) -> None:
    """Options are given where they are set; the folders stand behind `--`, where nothing is an option."""
    action.run(baseline="-b", candidate="c", policy="p.yaml", fidelity="f.json", blame="x.json", reports="out")
    options = ["--policy", "p.yaml", "--fidelity", "f.json", "--blame", "x.json"]
    assert action.arguments == ["eval", "gate", "--github", "-o", "out", *options, "--", "-b", "c"]
    assert action.outputs["report"] == "out/gate.html"


def test_what_is_not_set_is_not_passed(action: Action) -> None:
    """Without a policy and the rest, the gate is called without these options."""
    action.run(baseline="b", candidate="c")
    assert action.arguments == ["eval", "gate", "--github", "-o", "gate", "--", "b", "c"]


@pytest.mark.parametrize("evil", ["$(touch owned)", "`touch owned`", "x; touch owned", '"; touch owned; "', "a b*"])
def test_inputs_are_no_commands(action: Action, evil: str) -> None:
    """Whatever an input holds reaches k2quant as one argument, and nothing else happens."""
    done = action.run(baseline=evil, candidate=evil, policy=evil, reports=evil)
    assert done.returncode == 0
    assert action.arguments == ["eval", "gate", "--github", "-o", evil, "--policy", evil, "--", evil, evil]
    assert not (action.folder / "owned").exists()


@pytest.mark.parametrize("reports", ["", "gate\nverdict=PASS", "gate\rx"])
def test_a_folder_cannot_forge_outputs(action: Action, reports: str) -> None:
    """A name of two lines would be two outputs: it is refused before the gate runs."""
    done = action.run(baseline="b", candidate="c", reports=reports)
    assert done.returncode == 2
    assert not (action.folder / "output").exists()
    assert not (action.folder / "arguments").exists()


def test_a_gate_that_is_not_installed_is_an_error_with_its_remedy(action: Action) -> None:
    """The five lines alone install nothing: the annotation says what to set."""
    done = action.run(installed=False, baseline="b", candidate="c")
    assert done.returncode == 1
    assert done.stdout.startswith("::error title=Accuracy gate::k2quant is not installed;")


def test_a_step_that_never_came_to_the_gate_is_an_error() -> None:
    """Where the installation or an input fails no verdict is written: the output says ERROR, as the README has it."""
    assert load("action.yml")["outputs"]["verdict"]["value"] == "${{ steps.gate.outputs.verdict || 'ERROR' }}"
    assert "steps.ID.outputs.verdict != 'PASS' && steps.ID.outputs.verdict" in (FOLDER / "README.md").read_text()


def test_the_workflow_installs_what_its_tasks_need() -> None:
    """lm-eval's IFEval takes packages that only its extra brings."""
    workflow = load("accuracy.yml")
    assert "ifeval" in workflow["env"]["TASKS"].split(",")
    assert "lm-eval[ifeval]==" in next(step["run"] for step in steps("accuracy.yml") if step.get("name") == "Install")


@pytest.mark.parametrize("name", ["action.yml", "accuracy.yml"])
def test_no_script_holds_an_expression(name: str) -> None:
    """GitHub replaces expressions before the shell reads a script, so scripts have none: values come as variables."""
    scripts = [step["run"] for step in steps(name) if "run" in step]
    assert scripts
    assert not any("${{" in script for script in scripts)


def test_every_step_of_the_action_names_its_shell() -> None:
    """A composite action has no default shell, and a step without one does not run."""
    assert all(step["shell"] == "bash" for step in steps("action.yml"))


def test_the_workflow_uses_the_action_as_it_is() -> None:
    """It gives every required input and none that the action does not have."""
    inputs = load("action.yml")["inputs"]
    gate = next(step for step in steps("accuracy.yml") if step.get("uses") == "./examples/ci")
    assert gate["with"].keys() <= inputs.keys()
    assert {name for name, facts in inputs.items() if facts["required"]} <= gate["with"].keys()
    written = {step["run"].split(" -o ")[1] for step in steps("accuracy.yml") if " -o " in step.get("run", "")}
    assert {gate["with"]["baseline"], gate["with"]["candidate"]} == written


def test_the_workflow_keeps_the_reports_whatever_the_verdict() -> None:
    """The reports are uploaded also after a step that failed, from the folder that the action writes by default."""
    upload = next(step for step in steps("accuracy.yml") if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "${{ !cancelled() }}"
    folder = load("action.yml")["inputs"]["reports"]["default"]
    assert upload["with"]["path"].split() == [f"{folder}/gate.{kind}" for kind in ("html", "md", "xml", "json")]


def test_the_cached_baseline_follows_the_workflow() -> None:
    """Restored and kept under one key, which changes with the file that names model, tasks and versions; no comma."""
    keys = {step["with"]["key"] for step in steps("accuracy.yml") if "cache" in step.get("uses", "")}
    assert keys == {"accuracy-baseline-${{ hashFiles('.github/workflows/accuracy.yml') }}"}


def test_the_workflow_may_do_little() -> None:
    """Its token may read the repository and nothing else; it never runs strangers' code with secrets."""
    assert load("accuracy.yml")["permissions"] == {"contents": "read"}
    triggers = [value for key, value in load("accuracy.yml").items() if str(key) == "True"]  # YAML reads `on` as true
    assert [set(trigger) for trigger in triggers] == [{"pull_request", "workflow_dispatch"}]


def test_the_policy_is_one_that_the_gate_reads() -> None:
    """The example has all keys and gates tasks that the workflow runs, one with a margin of its own."""
    policy = read_policy(FOLDER / "gate.yaml")
    assert (policy.margin, policy.alpha, policy.power) == (0.01, 0.05, 0.8)
    assert dict(policy.tasks) == {"gsm8k": None, "triviaqa": None, "ifeval": 0.03}
    assert list(policy.tasks) == load("accuracy.yml")["env"]["TASKS"].split(",")


def test_the_readme_names_all_inputs_and_outputs() -> None:
    """What the action takes and gives stands in the tables."""
    text = (FOLDER / "README.md").read_text()
    action = load("action.yml")
    assert all(f"`{name}`" in text for name in [*action["inputs"], *action["outputs"]])
