"""Several real processes that train together, on forced CPU devices."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from jaxft.run.remote_workdir import training_folder
from jaxft.training.restore import load_checkpoint
from tests.helpers.runs import ROOT, TINY, Run, environment, metrics, same_bits, wait_for_steps, without_times

GENTLE = (  # random weights magnify float32 noise at every step; test_steps.py compares in float64
    *TINY,
    "--config.model.batch_norm=sync",
    "--config.num_epochs=2",
    "--config.optimizer.learning_rate=0.0001",
)


@contextmanager
def together(processes: int, devices: int, *arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Runs one command in several processes with this many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with ExitStack() as stack:
        started = []
        for index in range(processes):
            names = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
            command = [sys.executable, *map(str, arguments)]
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(devices) | names,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.kill)
            started.append(stack.enter_context(process))
        yield started


SCRIPT = """
import sys, time
import jax, numpy as np
from jaxft.data.batches import make_batches, local_shard
from jaxft.run.processes import broadcast_bool, run_together
from jaxft.errors import UserError

def main(argv):
    assert jax.process_count() == 2 and jax.device_count() == 4
    seen = jax.pmap(lambda index, mask: jax.lax.psum(jax.numpy.zeros(10).at[index].add(mask), "batch"),
                    axis_name="batch", out_axes=None)
    total = np.zeros(10)
    for batch in local_shard(make_batches(np.arange(10), 8, jax.device_count())):
        assert batch.index.shape == (2, 2)
        total += np.asarray(seen(batch.index, batch.mask))
    print(total.tolist(), broadcast_bool(True), flush=True)
    if argv == ["fail"] and jax.process_index() == 1:
        raise UserError("of process 1")
    if argv:
        for _ in range(10_000):
            np.asarray(seen(batch.index, batch.mask))
            time.sleep(0.01)

sys.exit(run_together(main, sys.argv[1:]))
"""


def test_processes_load_their_own_shards_and_every_example_counts_once() -> None:
    with together(2, 2, "-c", SCRIPT) as processes:
        outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == f"{[1.0] * 10} True\n"
    assert outputs[1][0] == ""  # only process 0 prints


@pytest.mark.parametrize(
    ("argument", "killed"), [("fail", None), ("wait", 0), pytest.param("wait", 1, marks=pytest.mark.slow)]
)
def test_if_one_process_ends_all_do(argument: str, killed: int | None) -> None:
    with together(2, 2, "-c", SCRIPT, argument) as processes:
        assert processes[0].stdout
        processes[0].stdout.readline()
        if killed is not None:
            processes[killed].send_signal(signal.SIGKILL)
        ended = time.monotonic()
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert time.monotonic() - ended < 60
    if killed is None:
        assert processes[1].returncode == 2
        assert "error: of process 1" in errors[1]
    other = 0 if killed != 0 else 1
    assert processes[other].returncode != 0
    # Our message if a collective fails first, JAX's if its coordinator notices first.
    assert "lost the others" in errors[other] or "another task died" in errors[other]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_like_one(run: Run, tmp_path: Path, processes: int) -> None:
    """Kills, stops and resumes the processes; compares with one uninterrupted process with as many devices."""
    several = (*GENTLE, "--workdir", tmp_path / "several")
    with together(processes, 2, *several) as started:
        wait_for_steps(started[0], tmp_path / "several", 6)
        started[-1].send_signal(signal.SIGKILL)
        for process in started:
            process.communicate(timeout=120)
            assert process.returncode
    with together(processes, 2, *several) as started:
        wait_for_steps(started[0], tmp_path / "several", 16)
        started[-1].send_signal(signal.SIGTERM)  # only to one, but all stop after the same step
        for process in started:
            _, error = process.communicate(timeout=120)
            assert process.returncode == 143, error
    step = load_checkpoint(tmp_path / "several", "latest").step
    assert step == metrics(tmp_path / "several")[-1]["step"]
    with together(processes, 2, *several) as started:
        outputs = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * processes, outputs
    assert f"resuming after step {step}" in outputs[0][0]
    assert all(stdout == "" for stdout, _ in outputs[1:])

    result = run(*GENTLE, "--workdir", tmp_path / "one", devices=2 * processes)
    assert result.returncode == 0, result.stderr
    rows, expected = metrics(tmp_path / "several"), metrics(tmp_path / "one")
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in expected]
    assert max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, expected, strict=True)) < 1e-3

    evaluate = ("-m", "jaxft.evaluate", "--json", "--workdir", tmp_path / "several", "--checkpoint=latest")
    counts = [json.loads(run(*evaluate, devices=devices).stdout) for devices in (1, 3)]
    with together(processes, 2, *evaluate) as started:
        counts.append(json.loads(started[0].communicate(timeout=300)[0]))
    assert {(line["pictures"], line["correct"]) for line in counts} == {(1000, round(rows[-1]["accuracy"] * 1000))}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_resumes_on_other_devices(run: Run, tmp_path: Path, dtype: str) -> None:
    """Trains on 8 devices, 1, 2 x 2, 1 and 8; each checkpoint evaluates alike on 1, 2 and 8 devices."""
    command = (*GENTLE, f"--config.model.dtype={dtype}", "--config.num_epochs=5", "--workdir", tmp_path / "run")
    for epoch, (processes, devices) in enumerate([(1, 8), (1, 1), (2, 2), (1, 1), (1, 8)], 1):
        with together(processes, devices, *command) as started:
            wait_for_steps(started[0], tmp_path / "run", 14 * epoch - 7)
            if epoch < 5:
                started[0].send_signal(signal.SIGTERM)
            for process in started:
                _, error = process.communicate(timeout=300)
                assert process.returncode == (143 if epoch < 5 else 0), error
        latest = load_checkpoint(tmp_path / "run", "latest")
        evaluate = ("-m", "jaxft.evaluate", "--json", "--workdir", tmp_path / "run", "--checkpoint=latest")
        counts = [json.loads(run(*evaluate, devices=devices).stdout) for devices in (1, 2, 8)]
        assert len({(line["pictures"], line["correct"]) for line in counts}) == 1
        assert counts[0]["checkpoint"] == latest.step
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["split"] == "train"]
    result = run(*command[:-1], tmp_path / "undisturbed")
    assert result.returncode == 0, result.stderr
    expected = [row["loss"] for row in metrics(tmp_path / "undisturbed") if row["split"] == "train"]
    tolerance = {"float32": 1e-3, "bfloat16": 3e-2}[dtype]
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_interrupted_run_of_two_processes_ends_with_the_same_bits(tmp_path: Path, scheme: str) -> None:
    """Covers a workdir that is a URL, with a synchronised local folder for each process."""
    for name, steps in (("undisturbed", None), ("killed", 9), ("killed", None)):
        workdir = f"{scheme if name == 'killed' else ''}{tmp_path / name}"
        with together(2, 2, *GENTLE, "--workdir", workdir) as started:
            if steps:
                wait_for_steps(started[0], training_folder(workdir), steps)
                started[1].send_signal(signal.SIGKILL)
            for process in started:
                process.communicate(timeout=600)
                assert bool(process.returncode) == bool(steps)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    assert without_times(metrics(killed)) == without_times(metrics(undisturbed))
    assert same_bits(load_checkpoint(killed, "latest").state, load_checkpoint(undisturbed, "latest").state)
