"""Two nodes train together; one is cut off, the other goes on alone; it comes back, and joins.

    pytest tests/two_nodes.py -m slow -s                # about 2 minutes on 2 cores; root, Linux
    python tests/two_nodes.py                           # the same

The nodes are two network namespaces joined by a veth pair, which share the run folder:

    node A 10.77.0.1, torchrun, rank 0  ---- fs0 / fs1 ----  10.77.0.2, torchrun, rank 1, node B

Three meetings of the dit stage: A and B; A alone, after every process of B got SIGKILL; both again.
Proven: each goes on at the last checkpoint that was in its place, with no hand on A; both end with
exit status 0; the weights agree to 1e-4 with those of one process that nobody disturbed. Other
numbers of ranks sum in another order, hence in fp64, where that is not amplified step by step; and
without the loss that aligns text and picture, which sees the clips of one rank only.
"""
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent / x) for x in ("", "../studies")]
from bench_parallel import ADDRESS, SPACES, link, unlink  # noqa: E402
from chaos import ROOT, begins, damaged, load_file, steps, wait, workers  # noqa: E402

EVERY, STEPS = 10, 240
TINY = f"""--device cpu --stage dit --clips.count 512 --train_tae.image_steps 4 --train_tae.steps 6
  --train_tae.batch 2 --train_tae.image_batch 8 --steps {STEPS} --batch 8 --dit.dim 48 --dit.depth 2
  --text.width 32 --train_dit.every {EVERY} --train_dit.precision fp64
  --train_dit.align 0 --timeout 60""".split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@contextmanager
def network():
    """The two namespaces and the link between them."""
    if not shutil.which("ip"):
        pytest.skip("no network namespaces here: no command ip")
    unlink()
    done = subprocess.run(["ip", "netns", "add", SPACES[0]], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
    try:
        link("none")
        yield
    finally:
        unlink()


def torchrun(node, folder, log):
    """torchrun of one node, which offers one rank; A keeps the meeting place."""
    with log.open("a") as out:
        return subprocess.Popen(
            ["ip", "netns", "exec", SPACES[node], sys.executable, "-m", "torch.distributed.run",
             "--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "3", "--rdzv-backend",
             "c10d", "--rdzv-endpoint", f"{ADDRESS[0]}:29400", "--rdzv-id", "filmstrip",
             "--rdzv-conf", f"is_host={1 - node},last_call_timeout=10", "--local-addr",
             ADDRESS[node], "train.py", "--workdir", str(folder), *TINY], cwd=ROOT, stdout=out,
            stderr=out, env={**ENV, "GLOO_SOCKET_IFNAME": f"fs{node}",
                             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def end(agent):
    """SIGKILL to torchrun and its rank."""
    if agent.poll() is None:
        for pid in [*workers(agent.pid).values(), agent.pid]:
            os.kill(pid, signal.SIGKILL)
        agent.wait()


def ranks_of(agent):
    """How many ranks its rank thinks there are."""
    (pid,) = workers(agent.pid).values()
    env = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return int(next(v for v in env if v.startswith("WORLD_SIZE=")).partition("=")[2])


def meeting(agents, folder, number, ranks):
    """Wait until start `number` of the dit stage has brought its first checkpoint -> its step."""
    def there():
        if (bad := next((a for a in agents if a.poll() is not None), None)) is not None:
            raise AssertionError(f"a node has ended, {bad.returncode}")
        starts = begins(folder, "dit")
        at = starts[-1] if len(starts) == number else STEPS
        return max(steps(folder / "dit"), default=0) >= at + EVERY and (at,)
    (at,) = wait(f"meeting {number}", there, 150)
    assert [ranks_of(a) for a in agents] == [ranks] * ranks
    print(f"{ranks} {'node' if ranks == 1 else 'nodes'}: from step {at}", flush=True)
    return at


def cut_and_joined(folder, logs):
    """The dit stage on A and B, then on A, then on both."""
    a = torchrun(0, folder, logs[0])
    b = torchrun(1, folder, logs[1])
    try:
        assert meeting([a, b], folder, 1, 2) == 0
        end(b)
        there = max(steps(folder / "dit"))
        assert meeting([a], folder, 2, 1) >= there
        b = torchrun(1, folder, logs[1])
        there = max(steps(folder / "dit"))
        assert meeting([a, b], folder, 3, 2) >= there
        assert (a.wait(300), b.wait(60)) == (0, 0)
    finally:
        end(a)
        end(b)


@pytest.mark.slow
def test_a_node_leaves_and_comes_back(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    with network():
        done = subprocess.run([sys.executable, "train.py", "--workdir", str(one), *TINY], cwd=ROOT,
                              capture_output=True, text=True, env=ENV)
        assert done.returncode == 0, done.stderr[-3000:]
        shutil.copytree(one, two, ignore=lambda d, names: {
            "dit", "log.jsonl", "model.safetensors"} & set(names))
        try:
            cut_and_joined(two, logs)
        except BaseException:
            for log in logs:
                print(log.read_text()[-4000:] if log.exists() else "")
            raise
    assert not damaged(two)
    x, y = (load_file(f / "model.safetensors") for f in (one, two))
    apart = max((x[k] - y[k]).abs().max().item() for k in x)
    print(f"weights of one process and of the nodes are at most {apart:.1e} apart")
    assert apart < 1e-4


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        test_a_node_leaves_and_comes_back(Path(folder))
