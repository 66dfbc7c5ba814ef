"""The examples for clusters: they parse, say one thing, and their commands run as far as one machine can."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import k2quant
from k2quant.checkpoint.reader import REPORT
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from places import ROOT

FOLDER = ROOT / "examples" / "cluster"
SCRIPTS = ("array.sh", "ray.sh")
RUNS = f"""#!/bin/bash
exec {sys.executable} -m k2quant "$@"
"""
NOTES = """#!/bin/bash
echo "$(basename "$0") RAY_ADDRESS=${RAY_ADDRESS:-} $*" >> "$NOTES"
"""
HOSTS = "#!/bin/bash\nprintf 'n1\\nn2\\nn3\\n'\n"
STEP = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --nodelist=* ]] && on=${1#--nodelist=}; shift; done
echo "on $on: $*" >> "$NOTES"
"""


def program(folder: Path, name: str, text: str) -> None:
    """Write a program that stands in for another."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run(command: list[str], programs: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds these programs first."""
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", **variables}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, env=environment)


def load(name: str) -> dict[str, Any]:
    """Return one of the YAML files."""
    content: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return content


def directives(name: str) -> dict[str, str]:
    """Return what a script asks Slurm for."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (FOLDER / name).read_text(), re.MULTILINE)
    return dict(lines)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of an output but its report."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != REPORT}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of an expert each."""
    folder, random = tmp_path_factory.mktemp("cluster") / "source", np.random.default_rng(0)
    shards: dict[str, Shard] = {}
    for number in range(3):
        name = f"model.layers.{number}.mlp.experts.0.down_proj.weight"
        weight = random.integers(0x3C00, 0x3F80, (64, 64), np.uint16)
        shards[f"model-{number + 1:05}-of-00003.safetensors"] = {name: ("BF16", weight)}
    write_checkpoint(folder, shards, {"model_type": "kimi_k2"})
    k2quant.convert(folder, folder.parent / "whole", "int4")
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_one_that_bash_and_slurm_read(name: str) -> None:
    """Directives stand before the first command, where Slurm looks for them, and every option is one that it has."""
    subprocess.run(["/bin/bash", "-n", str(FOLDER / name)], check=True)
    text = (FOLDER / name).read_text()
    assert text.startswith("#!/bin/bash\n")
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")
    known = {"job-name", "array", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "mem", "exclusive", "time"}
    assert directives(name).keys() <= known | {"requeue"}
    assert text.count("#SBATCH --") == len(directives(name))


def test_a_job_array_counts_its_parts_from_one() -> None:
    """As `--part` does."""
    assert re.fullmatch(r"1-[0-9]+", directives("array.sh")["array"])


def test_tasks_of_the_array_write_what_one_machine_writes(source: Path, tmp_path: Path) -> None:
    """The last of two tasks completes the folder."""
    program(tmp_path / "bin", "k2quant", RUNS)
    there = tmp_path / "there"
    for task in ("2", "1"):
        assert not (there / "config.json").exists()
        done = run(
            ["bash", str(FOLDER / "array.sh")],
            tmp_path / "bin",
            SOURCE=str(source),
            DESTINATION=str(there),
            SLURM_ARRAY_TASK_ID=task,
            SLURM_ARRAY_TASK_COUNT="2",
        )
        assert done.returncode == 0, done.stderr
    assert contents(there) == contents(source.parent / "whole")


def test_pods_of_the_job_write_what_one_machine_writes(source: Path, tmp_path: Path) -> None:
    """Their numbers begin at 0, and there are as many parts as pods."""
    job = load("job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    [container] = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert variables["PARTS"] == str(spec["completions"])
    assert variables["WORKERS"] == container["resources"]["limits"]["cpu"]
    program(tmp_path / "bin", "k2quant", RUNS)
    there = tmp_path / "there"
    for index in ("0", "1"):
        variables |= {"PARTS": "2", "SOURCE": str(source), "DESTINATION": str(there), "JOB_COMPLETION_INDEX": index}
        done = run([*container["command"], *container["args"]], tmp_path / "bin", **variables)
        assert done.returncode == 0, done.stderr
    assert contents(there) == contents(source.parent / "whole")


@pytest.mark.parametrize("status", [0, 1])
def test_the_script_with_ray_has_one_head_and_every_other_node_join_it(status: int, tmp_path: Path) -> None:
    """Then one command over all of them; the job ends as that does."""
    for name, text in (("scontrol", HOSTS), ("srun", STEP), ("k2quant", f"{NOTES}exit {status}\n")):
        program(tmp_path / "bin", name, text)
    said = tmp_path / "notes"
    done = run(
        ["bash", str(FOLDER / "ray.sh")],
        tmp_path / "bin",
        NOTES=str(said),
        RAY_PAUSE="0",
        SLURM_CPUS_PER_TASK="16",
        SLURM_JOB_NODELIST="n[1-3]",
        SOURCE="here",
        DESTINATION="there",
    )
    assert done.returncode == status, done.stderr
    ray = "env -u RAY_ADDRESS ray start"
    assert sorted(said.read_text().splitlines()) == [
        "k2quant RAY_ADDRESS=n1:6379 convert --to int4 --cluster auto here there",
        f"on n1: {ray} --head --port=6379 --num-cpus=16 --disable-usage-stats --block",
        f"on n2: {ray} --address=n1:6379 --num-cpus=16 --disable-usage-stats --block",
        f"on n3: {ray} --address=n1:6379 --num-cpus=16 --disable-usage-stats --block",
    ]


def test_the_ray_job_is_one_that_kuberay_reads() -> None:
    """By the fields of its API (ray.io/v1); a head without cores, and volumes that all pods have."""
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
    assert spec.keys() == known
    cluster = spec["rayClusterSpec"]
    assert cluster.keys() == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head.keys() == {"rayStartParams", "template"}
    assert head["rayStartParams"] == {"num-cpus": "0"}
    fields = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert all(group.keys() == fields for group in workers)
    pods = [group["template"]["spec"] for group in (head, *workers)]
    assert all(pod["volumes"] == pods[0]["volumes"] for pod in pods)
    assert all(pod["containers"][0]["volumeMounts"] == pods[0]["containers"][0]["volumeMounts"] for pod in pods)


def test_the_page_names_every_file() -> None:
    """And no other."""
    named = set(re.findall(r"^\| `([a-z.]+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE))
    assert named == {path.name for path in FOLDER.iterdir()} - {"README.md"}
