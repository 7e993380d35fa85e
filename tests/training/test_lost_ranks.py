"""Three small processes: one dies, hangs, fails or is slow; what do the others say, and when do they end?"""

import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from nemo_slam.training import lost_ranks
from nemo_slam.training.lost_ranks import LostRankError, LostRanks

WORLD = 3
END = 60.0  # seconds that a busy machine may take; what hangs takes for ever


def work(rank, port, folder, own_error):
    """Sums over the ranks again and again, 100 times at most; says on stderr what ends it."""
    lost_ranks.INTERVAL, lost_ranks.AFTER_ERROR, lost_ranks.UNWINDING = 0.2, 2.0, 1.0
    os.dup2(os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    watch = LostRanks(lost_after=4.0)
    try:
        with watch:
            watch.start(lost_ranks._own_connection(), rank, WORLD)
            for step in range(100):
                if step == 5 and own_error == rank:
                    raise ValueError("no such file")
                dist.all_reduce(torch.ones(1))
                (folder / f"{rank}.step").write_text(str(step))
                time.sleep(0.05)
            dist.barrier()
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(3)


@pytest.fixture
def ranks(tmp_path):
    """A function that starts the processes, and one that waits for them and hands over what each of them said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nemo_slam.training.lost_ranks"])
    jobs = []

    def start(own_error=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        jobs.extend(context.Process(target=work, args=(r, port, tmp_path, own_error)) for r in range(WORLD))
        for job in jobs:
            job.start()
        deadline = time.monotonic() + END
        while own_error is None and not all((tmp_path / f"{r}.step").exists() for r in range(WORLD)):
            assert time.monotonic() < deadline, "the processes do not start"
            time.sleep(0.05)
        return jobs

    def finish(survivors):
        deadline = time.monotonic() + END
        for rank in survivors:
            jobs[rank].join(timeout=max(0.0, deadline - time.monotonic()))
        return [(jobs[rank].exitcode, (tmp_path / f"{rank}.log").read_text()) for rank in survivors]

    yield start, finish
    for job in jobs:
        job.kill()
        job.join()


HOST = socket.gethostname()


@pytest.mark.parametrize(("dead", "number"), [(1, signal.SIGKILL), (2, signal.SIGSTOP)], ids=["killed", "stopped"])
def test_the_others_name_a_rank_that_is_gone_and_end(ranks, dead, number):
    """Killed, its connections break; stopped, all wait for it without an error, as for a machine without power."""
    start, finish = ranks
    os.kill(start()[dead].pid, number)
    for code, said in finish([r for r in range(WORLD) if r != dead]):
        assert code in (1, 3), said
        assert f"no answer from rank {dead} ({HOST})" in said
        assert "LostRankError" in said


def test_the_others_name_rank_0(ranks):
    """With it goes the store where all meet."""
    start, finish = ranks
    os.kill(start()[0].pid, signal.SIGKILL)
    for code, said in finish([1, 2]):
        assert code in (1, 3), said
        assert f"no answer from rank 0 ({HOST}), where all ranks meet" in said


@pytest.mark.parametrize("rank", [0, 2])
def test_the_others_hear_of_an_error_of_one_rank(ranks, rank):
    start, finish = ranks
    start(own_error=rank)
    for other, (code, said) in enumerate(finish(range(WORLD))):
        assert code in (1, 3), said
        if other == rank:
            assert "ValueError: no such file" in said
            assert "LostRankError" not in said
        else:
            assert f"ended by an error of rank {rank} ({HOST}): ValueError: no such file" in said


def test_a_slow_rank_is_waited_for(ranks):
    """It stands still for two thirds of the time, and once for longer than half of what would mean lost."""
    start, finish = ranks
    jobs = start()
    os.kill(jobs[1].pid, signal.SIGSTOP)
    time.sleep(2.2)
    for _ in range(8):
        os.kill(jobs[1].pid, signal.SIGCONT)
        time.sleep(0.1)
        os.kill(jobs[1].pid, signal.SIGSTOP)
        time.sleep(0.2)
    os.kill(jobs[1].pid, signal.SIGCONT)
    assert [code for code, _ in finish(range(WORLD))] == [0] * WORLD


def test_an_error_of_one_process_stays_what_it_is():
    with pytest.raises(RuntimeError, match="gloo") as caught, LostRanks(30):
        raise RuntimeError("gloo: Connection closed by peer")
    assert not isinstance(caught.value, LostRankError)
