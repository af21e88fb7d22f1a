"""launch: each rank runs once and knows who it is; whatever one of them or the launcher meets, all end, soon and as one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import failing
import jobs
import launched
import pytest
import torch
import torch.distributed as dist

import fntrain as ft
from fntrain.core import tree
from fntrain.shell.launching import local
from fntrain.shell.launching.launch import launch
from fntrain.shell.launching.network import rank_from_environment

HERE = Path(__file__).parent


def a_start():
    """Seconds that starting Python takes: what this machine is worth at the moment."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - begin


# Within which a job ends when one of its ranks has failed: 5 s, of a machine that starts Python in 0.1 s at most.
SOON = 5.0 * max(1.0, a_start() / 0.1)


@pytest.fixture
def reports(tmp_path):
    """reports(): what the ranks of `launched.report` wrote, and forget it."""

    def read():
        found = {path.name: path.read_text().splitlines() for path in sorted(tmp_path.glob("rank *"))}
        for name in found:
            (tmp_path / name).unlink()
        return found

    return read


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What training comes to with two ranks, if nothing happens."""
    directory = tmp_path_factory.mktemp("undisturbed")
    launch(partial(launched.train, directory, every=2), 2)
    return digest(directory)


def digest(directory):
    state = ft.load(ft.latest(directory))
    assert state.step == launched.STEPS
    return ft.digest(state)


# ------------------------------------------------------------------------------------------ ranks of this process


def test_each_rank_runs_once_and_knows_who_it_is(tmp_path, reports, monkeypatch):
    """One after the other, from a thread too: ranks, world size, a sum over all, and the environment of now."""
    report = partial(launched.report, tmp_path)
    for size in (3, 2):
        monkeypatch.setenv("FOR_RANKS", f"for {size}")
        thread = threading.Thread(target=launch, args=(report, size))
        thread.start()
        thread.join()
        total = 2**size - 1
        assert reports() == {f"rank {rank}": [f"{size} {total} {rank} for {size}"] for rank in range(size)}
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.delenv("FOR_RANKS")
    launch(partial(launched.nested, tmp_path), 2)
    assert reports() == {f"rank {rank}": [f"2 3 {rank} None"] for rank in range(2)}
    here = []
    launch(lambda: here.append(os.getpid()))
    assert here == [os.getpid()]


def test_in_a_process_group_it_just_runs(ranks, tmp_path, reports):
    """Where others have made one."""
    ranks(2)(launched.nested, tmp_path)
    assert {name: lines[0].split()[:2] for name, lines in reports().items()} == {
        "rank 0": ["2", "3"],
        "rank 1": ["2", "3"],
    }


def test_wrong_arguments_are_refused():
    """Numbers, a missing rendezvous, and a function that can't be sent, with what to do."""
    for arguments, message in [
        ({"num_processes": 0}, "num_processes: got 0"),
        ({"num_processes": 2, "max_restarts": -1}, "max_restarts: got -1"),
        ({"num_machines": 2, "machine_rank": 2, "rendezvous": "a:1"}, "machine_rank: got 2, expected less than"),
        ({"num_machines": 2}, 'rendezvous: got None, expected "host:port"'),
        ({"num_machines": 2, "rendezvous": "host"}, "rendezvous: got 'host'"),
    ]:
        with pytest.raises(ValueError, match=message):
            launch(launched.report, **arguments)
    with pytest.raises(
        TypeError, match=r"fn: can't be sent .* at the top level of a module or the script, or .*torchrun"
    ):
        launch(lambda: None, 2)


TOLD = {
    "raises": r"rank 1 of 2 failed:\nTraceback(.|\n)*\n *raise error\nValueError: of rank 1\nand a note\nranks \[0\] were",
    "is killed": "rank 1 of 2 was killed by SIGKILL\n",
    "exits": "rank 1 of 2 ended with status 3 without a word\n",
    "says": r"rank 1 of 2 failed:\nenough of it\nranks \[0\]",
    "says at length": "rank 1 of 2 failed:\n!{1000000}\n",
    "interrupted": "rank 1 of 2 was killed by SIGINT\n",
    "returns": r"rank 0 of 2 failed:\nTraceback(.|\n)*RuntimeError: .*(closed|reset) by peer",
}


@pytest.mark.parametrize(
    ("how", "others"), [*((how, "waits") for how in TOLD), ("raises", "computes"), ("raises", "deaf")]
)
def test_one_rank_that_fails_ends_the_job_and_is_named_first(tmp_path, how, others):
    """Within 5 s, with its own traceback; the others fail because of it, or are ended, even if they don't heed SIGTERM."""
    with pytest.raises(ft.LaunchError) as caught:
        launch(partial(launched.fail, how, others, tmp_path), 2)
    assert time.time() - float((tmp_path / "failed at").read_text()) < SOON
    assert re.match(TOLD[how], str(caught.value)), str(caught.value)


class Ending:
    """A rank that is seen to have ended when it is looked at for the second time, its pipe closed before."""

    sentinel, looks = -1, 0

    @property
    def exitcode(self):
        self.looks += 1
        return None if self.looks == 1 else -9


def test_nobody_waits_for_a_rank_that_has_just_ended(monkeypatch):
    """With nobody left to wait for, a wait takes its whole time: 10 s after SIGKILL."""
    waits = []
    monkeypatch.setattr(local, "wait", lambda waited, timeout: waits.append(waited))
    job = local.LocalJob(launched.report, 1, timedelta(seconds=1))
    job.processes = [Ending()]
    job.join(10.0)
    assert [] not in waits and job.processes[0].looks > 1


def test_a_rank_that_waits_alone_says_so_after_the_timeout(tmp_path):
    """The timeout is also that of what the library itself exchanges, for which torch's own would be 30 minutes."""
    with pytest.raises(ft.LaunchError, match=r"rank 0 of 2 waited for the others here: (.|\n)*by all ranks"):
        launch(partial(launched.wait_alone, tmp_path), 2, timeout=timedelta(seconds=2))
    assert time.time() - float((tmp_path / "failed at").read_text()) < 2 + SOON


def test_a_hook_that_raises_on_one_rank_ends_the_job(tmp_path):
    """No hang; the error says where, and which hooks could not end as usual; what was saved is whole."""
    with pytest.raises(ft.LaunchError, match=r"rank 1 of 2 failed:(.|\n)*in a hook of rank 1") as caught:
        launch(partial(launched.raise_in_hook, tmp_path), 2)
    assert "after_train of hook 'checkpoint' was skipped: other ranks may not answer any more" in str(caught.value)
    assert ft.load(ft.latest(tmp_path)).step == 5


def test_a_job_that_is_started_again_ends_like_an_undisturbed_one(tmp_path, undisturbed, caplog):
    """Rank 1 kills itself in step 5; the second attempt goes on from step 4."""
    launch(partial(launched.die_once, tmp_path), 2, max_restarts=2)
    assert digest(tmp_path) == undisturbed
    assert [line.splitlines()[0] for line in caplog.messages] == ["rank 1 of 2 was killed by SIGKILL"]
    assert caplog.messages[0].endswith("the job is started again, for the 1. time of 2")


def test_when_no_restart_is_left_the_error_is_raised(tmp_path):
    """After 1 + max_restarts attempts, with the traceback of the rank."""
    with pytest.raises(ft.LaunchError, match=r"rank 1 of 2 failed:\nTraceback(.|\n)*ValueError: again"):
        launch(partial(launched.die_once, tmp_path, always=True), 2, max_restarts=1)
    assert (tmp_path / "attempts").read_text() == "xx"


def spoiled(model, batch):
    """The loss, not finite on rank 1 in step 2."""
    loss = jobs.mean_loss(model, batch)
    spoiled.calls += 1
    return loss * float("nan") if dist.get_rank() == 1 and spoiled.calls == 2 else loss


def with_nan(on_nonfinite):
    spoiled.calls = 0
    torch.manual_seed(0)
    model, sgd = jobs.Net(), ft.optimizer(torch.optim.SGD, lr=0.1)
    step_fn = ft.shell.distribute(ft.supervised_step(model, spoiled, sgd, on_nonfinite=on_nonfinite))
    data, digests = jobs.parts()[2], []
    look = ft.hook(after_step=lambda state: digests.append(tree.fingerprint(dict(state.params))))
    try:
        ft.fit(step_fn, [look], state=ft.init_state(model, sgd), data=data, max_steps=4)
    except ft.NonFiniteError as error:
        return digests, str(error)
    return digests, None


def test_a_nan_on_one_rank_is_one_for_all(ranks):
    """All skip the same step, or all raise alike."""
    (digests, _), other = ranks(2)(with_nan, "skip")
    assert other == (digests, None)
    assert [one == two for one, two in pairwise(digests)] == [True, False, False]
    (digests, error), other = ranks(2)(with_nan, "raise")
    assert other == (digests, error)
    assert "step 2" in error
    assert len(digests) == 1


# ----------------------------------------------------------------------------------------------- launchers started


@contextmanager
def started(*command, environment=None, inside=()):
    """A process in a session of its own, which leaves no other behind: all that it starts carry a mark."""
    mark = uuid.uuid4().hex
    command = [*inside, sys.executable, *map(str, command)]
    variables = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1", "MARK": mark}
    process = subprocess.Popen(
        command,
        stdout=-1,
        stderr=-2,
        text=True,
        start_new_session=True,
        env=os.environ | variables | (environment or {}),
        cwd=HERE,
    )
    with process:
        try:
            yield process
            if process.poll() is None:
                raise RuntimeError("it still runs")
            late = time.monotonic() + SOON
            while left := marked(mark):
                if time.monotonic() > late:
                    raise AssertionError(f"left behind: {list(left.values())}")
                time.sleep(0.05)
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)


def marked(mark):
    """Processes with the mark in their environment, and their commands."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (path / "environ").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
    return found


def wait_for(process, *starts):
    """Read lines until each of these has begun one; returns the last words of those, or all lines up to the only one."""
    found, lines = {}, []
    while len(found) < len(starts):
        line = process.stdout.readline()
        lines.append(line.rstrip())
        if not line:
            raise RuntimeError(f"ended with {process.wait()}: {lines}")
        found |= {start: line.split()[-1] for start in starts if line.startswith(start)}
    return [int(found[start]) for start in starts] if starts[0].startswith("step") else lines


def ended(process, seconds=300):
    """The lines that are left, and the status."""
    output, _ = process.communicate(timeout=seconds)
    return [*output.splitlines(), f"status {process.returncode}"]


def each(number):
    return lambda launcher, pids: [os.kill(pid, number) for pid in (launcher, *pids)]


SENDS = {
    "SIGTERM to one rank": lambda launcher, pids: os.kill(pids[1], signal.SIGTERM),
    "SIGTERM to all ranks": lambda launcher, pids: [os.kill(pid, signal.SIGTERM) for pid in pids],
    "SIGTERM to the launcher": lambda launcher, pids: os.kill(launcher, signal.SIGTERM),
    "SIGUSR1 to launcher and ranks": each(signal.SIGUSR1),
    "SIGTERM to every process": lambda launcher, pids: os.killpg(launcher, signal.SIGTERM),
    "SIGINT to every process": lambda launcher, pids: os.killpg(launcher, signal.SIGINT),
    "SIGINT to the launcher": lambda launcher, pids: os.kill(launcher, signal.SIGINT),
}


def law_stops_as_one(directory, whole, names, *broken):
    """A signal in step 3: all ranks end after it, one save, the signal's status; started again, the run ends as if undisturbed."""
    places = [directory / name for name in names]
    with started("launched.py", "slow", *places, *broken) as job:
        for name, place in zip(names, places, strict=True):
            number = signal.Signals[name.split()[0]]
            SENDS[name](job.pid, wait_for(job, "step 0", "step 1"))
            lines = wait_for(job, "status") if name != names[-1] else ended(job)
            assert lines[-1] == f"status {128 + number}", lines
            told = sorted(line for line in lines if line.startswith(("end", "saved", "Traceback")))
            reason = f"{number.name} received" + (" (rank 1)" if "one rank" in name else "")
            assert told == [f"end 0 3 {reason}", f"end 1 3 {reason}", "saved 3"], lines
            assert ft.load(ft.latest(place)).step == 3
    for place in places:
        launch(partial(launched.train, place), 2)
        assert digest(place) == whole


def test_a_signal_stops_all_ranks_after_one_step_with_one_save(tmp_path, undisturbed):
    """Whoever of the launcher and its ranks gets it, and if several do, it counts once; the next job has signals too."""
    law_stops_as_one(tmp_path, undisturbed, list(SENDS))


@pytest.mark.parametrize("broken", ["twice", "unprotected"])
def test_the_law_can_fail(tmp_path, undisturbed, broken):
    """A launcher that passes on what its ranks have got, and one whose forkserver heeds SIGTERM, are refused."""
    with pytest.raises(AssertionError, match="status" if broken == "unprotected" else "end 0 3"):
        law_stops_as_one(tmp_path, undisturbed, ["SIGTERM to every process"], broken)


def test_a_second_signal_ends_all_at_once(tmp_path):
    """While the ranks are in a long step, after the first."""
    with started("launched.py", "stubborn", tmp_path) as job:
        wait_for(job, "step 0", "step 1")
        job.terminate()
        wait_for(job, "told")
        since = time.monotonic()
        job.terminate()
        lines = ended(job)
        assert time.monotonic() - since < SOON
        assert lines[-1] == "status 143", lines
        assert not any(line.startswith(("saved", "end")) for line in lines)


def test_without_the_hook_a_signal_ends_the_job_with_its_status_and_hides_no_error(tmp_path):
    """SIGINT and SIGTERM that nobody heeds; a rank that fails when it is told to go, as by a save, is heard."""
    with started("launched.py", "idle", *(tmp_path / place for place in ("1", "2", "fails"))) as job:
        for number in (signal.SIGINT, signal.SIGTERM):
            wait_for(job, "step 0", "step 1")
            job.send_signal(number)
            assert wait_for(job, "status") == [f"status {128 + number}"]
        wait_for(job, "step 0", "step 1")
        job.terminate()
        lines = ended(job)
    assert lines[-1] == "status 1"
    assert "fntrain.LaunchError: rank 1 of 2 failed:" in lines
    assert lines.count("ValueError: when all was to be saved") == 1


def test_a_launcher_that_is_killed_leaves_no_rank(tmp_path):
    """By SIGKILL, while the ranks are in a long step."""
    with started("launched.py", "stubborn", tmp_path) as job:
        wait_for(job, "step 0", "step 1")
        job.kill()
        assert job.wait(timeout=120) == -signal.SIGKILL


def test_a_script_without_a_guard_is_told_so(tmp_path):
    """The ranks import it; the last line says what is missing."""
    (tmp_path / "unguarded.py").write_text("import launched\nlaunched.launch(launched.report, 2)\n")
    with started(tmp_path / "unguarded.py") as job:
        *_, line, status = ended(job)
    assert status == "status 1"
    assert 'call launch under `if __name__ == "__main__":`' in line


def test_ranks_of_torchrun_and_slurm_just_run(tmp_path, reports):
    """What started them says who they are; the number in the script does not count."""
    run = ["launched.py", "report", tmp_path, "num_processes=7"]
    with started("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *run) as job:
        assert ended(job)[-1] == "status 0"
    assert reports() == {f"rank {rank}": [f"2 3 {rank} None"] for rank in range(2)}
    with ExitStack() as stack:
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "2"}
        tasks = [
            step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_JOB_ID": str(free_port()), "LOCAL_RANK": "?"}
            for rank in "01"
        ]
        port = {"MASTER_PORT": str(free_port())}
        jobs = [stack.enter_context(started(*run, environment=task | port)) for task in tasks]
        for job in jobs:
            assert ended(job) == ["status 0"]
    assert reports() == {f"rank {rank}": ["2 3 ? None"] for rank in range(2)}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_who_a_process_is_is_read_from_its_environment():
    """torchrun's variables, SLURM's with a port of the job, and neither, in a batch script too."""
    slurm = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    place = rank_from_environment(slurm)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 8, 1, 4)
    assert place.address == "gpu07:23456"
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1", "LOCAL_RANK": "1"}
    place = rank_from_environment(slurm | torchrun | {"LOCAL_WORLD_SIZE": "4"})
    assert (place.rank, place.local_rank, place.local_world_size, place.address) == (5, 1, 4, None)
    assert rank_from_environment({}) is None
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NODELIST": "a"}) is None
    assert rank_from_environment(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_main_starts_the_ranks_of_a_script(tmp_path):
    """A recipe of lambdas, by its path and as a module: results once, an error as one message, status 0 and 1."""
    flags = ["--num-processes", "2", "--output-dir", tmp_path]
    with started("-m", "scripted", *flags) as job:
        lines = ended(job)
    assert lines[-1] == "status 0", lines
    assert lines.count("step 4 (max_steps=4 reached)") == 1
    assert ft.load(ft.latest(tmp_path)).step == 4
    with started("scripted.py", *flags, "--no-resume") as job:
        lines = ended(job)
    assert lines[-1] == "status 1", lines
    assert [line for line in lines if "Traceback" in line] == []
    assert len([line for line in lines if "CheckpointError: " in line]) == 1, lines


# ------------------------------------------------------------------------------------------------- two machines


OURS = ("launched.py", "held", "{directory}", "num_machines=2", "num_processes=1", "max_restarts=2")
AGENTS = {
    "ours": (*OURS, "machine_rank={machine}", "rendezvous={host}:{port}"),
    "torchrun": (
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "{host}:{port}", "--rdzv-id", "one"),
        *("--rdzv-conf", "is_host={is_host}"),
        *("launched.py", "held", "{directory}"),
    ),
}


@contextmanager
def apart():
    """Two machines as the network has them: what starts a command in each, neither reaches the other's loopback."""
    name = f"fntrain-{uuid.uuid4().hex[:8]}"
    commands = [
        *(f"ip netns add {name}-{machine}" for machine in range(2)),
        f"ip link add v0 netns {name}-0 type veth peer name v1 netns {name}-1",
        *(f"ip -n {name}-{machine} addr add 10.77.0.{machine + 1}/24 dev v{machine}" for machine in range(2)),
        *(f"ip -n {name}-{machine} link set {link} up" for machine in range(2) for link in ("lo", f"v{machine}")),
    ]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"needs network namespaces: {getattr(error, 'stderr', None) or error}")
        yield [["ip", "netns", "exec", f"{name}-{machine}"] for machine in range(2)]
    finally:
        with suppress(OSError):
            for machine in range(2):
                subprocess.run(["ip", "netns", "delete", f"{name}-{machine}"], capture_output=True)


@pytest.mark.parametrize("kind", ["ours", "ours apart", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_of_two_machines_one_is_killed_and_comes_back(tmp_path, undisturbed, kind):
    """Its agent and rank are killed in step 5; started again, the job goes on from step 4 and ends as if undisturbed.

    Two agents on one loopback, and in two network namespaces where this machine's name means its own loopback.
    """
    with apart() if kind == "ours apart" else nullcontext(((), ())) as machines:
        host = "10.77.0.1" if machines[0] else "127.0.0.1"
        values = {"directory": tmp_path, "port": free_port(), "host": host}
        come_back(partial(agent, kind.split()[0], machines, values), tmp_path)
    assert digest(tmp_path) == undisturbed


def agent(kind, machines, values, machine):
    command = [part.format(machine=machine, is_host=machine == 0, **values) for part in AGENTS[kind]]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if kind == "torchrun" else {}  # launch sets it
    return started(*command, environment=environment, inside=machines[machine])


def come_back(agent, directory):

    with ExitStack() as stack:
        first = stack.enter_context(agent(0))
        with agent(1) as second:
            wait_for(first, "step")
            (rank,) = wait_for(second, "step")
            os.kill(rank, signal.SIGKILL)
            second.kill()
            second.wait()
        (directory / "go").touch()
        again = stack.enter_context(agent(1))
        for job in (first, again):
            lines = ended(job, 90)
            assert lines[-1] == "status 0", lines
            assert any(re.fullmatch(r"rank \d 2 \d+", line) for line in lines), lines


def test_two_machines_of_two_ranks_are_one_world_and_stop_as_one(tmp_path):
    """SIGTERM to one launcher and all its ranks stops both jobs, with a save, and neither is started again."""
    port = free_port()
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(
                started(
                    *("launched.py", "slow", tmp_path, "num_machines=2", "max_restarts=1"),
                    *(f"machine_rank={machine}", f"rendezvous=127.0.0.1:{port}"),
                )
            )
            for machine in range(2)
        ]
        wait_for(jobs[1], "step")
        os.killpg(jobs[1].pid, signal.SIGTERM)
        for job in jobs:
            lines = ended(job)
            assert lines[-1] == "status 143", lines
            assert len([line for line in lines if "SIGTERM received (rank" in line]) == 2, lines
    assert ft.load(ft.latest(tmp_path)).step == 3


def law_names_the_first(failing_jobs, *broken):
    """Every launcher names the rank that failed first, with its traceback; what another says of it comes after."""
    ports = [free_port() for _ in failing_jobs]
    with ExitStack() as stack:
        jobs = [stack.enter_context(started("failing.py", machine, *ports, *broken)) for machine in range(2)]
        for job in jobs:
            lines = ended(job)
            raised = [json.loads(line.removeprefix("raised ")) for line in lines if line.startswith("raised ")]
            assert len(raised) == len(failing_jobs), lines
            for (rank, how), message in zip(failing_jobs, raised, strict=True):
                first = rf"failed, 0 restarts done:\nTraceback(.|\n)*\nValueError: of rank {rank}(\n|$)"
                killed = r"was killed by SIGKILL, 0 restarts done(\n|$)"
                assert re.match(f"rank {rank} " + (killed if how == "is killed" else first), message), message
                assert len(re.findall("Traceback", message)) == (how == "raises"), message
                assert all(re.match(r"rank \d then said: ", line) for line in later(message, rank)), message


def later(message, rank):
    """The lines after what the first rank said."""
    lines = message.splitlines()
    return lines[1:] if "killed" in lines[0] else lines[lines.index(f"ValueError: of rank {rank}") + 1 :]


@pytest.mark.parametrize("number", [1, pytest.param(len(failing.JOBS), marks=pytest.mark.slow)])
def test_of_all_machines_the_rank_that_failed_first_is_named_first(number):
    """In jobs of two machines, of which one rank raises or is killed; by the launchers of both."""
    law_names_the_first(failing.JOBS[:number])


@pytest.mark.slow
def test_the_law_of_the_first_rank_can_fail():
    """Without the shared list each launcher knows the failures of its own machine only."""
    with pytest.raises(AssertionError):
        law_names_the_first(failing.JOBS[:1], "broken")
