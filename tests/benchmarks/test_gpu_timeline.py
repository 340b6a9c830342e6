import pytest

from benchmarks.gpu import timeline


def row(step: int, seconds: float, *, epoch: int = 1, split: str = "train", loss: float = 1.0) -> timeline.Row:
    speed = round(64 / seconds, 2)
    row = {"step": step, "epoch": epoch, "split": split, "loss": loss, "accuracy": 0.5}
    return row | {"seconds": seconds, "images_per_second": speed}


RUN = [
    row(1, 10.0),
    *(row(step, 0.1) for step in range(2, 6)),
    row(5, 2.0, split="eval"),
    row(6, 3.1, epoch=2),
    *(row(step, 0.1, epoch=2) for step in range(7, 9)),
]


def test_epochs_tell_waiting_from_training() -> None:
    """The first step waits within its row; the evaluation and the second epoch wait before their first row."""
    times = [15.0, 15.1, 15.2, 15.3, 15.4, 27.4, 33.5, 33.6, 33.7]
    first, second = timeline.epochs(list(zip(times, RUN, strict=True)), begun=5.0)
    assert first["waited_seconds"] == pytest.approx(9.9)
    assert first["training_seconds"] == pytest.approx(0.5)
    assert first["images_per_second"] == pytest.approx(640)
    assert (first["evaluation_seconds"], first["accuracy"]) == (2.0, 0.5)
    assert first["evaluation_waited_seconds"] == pytest.approx(10)
    assert second["waited_seconds"] == pytest.approx(3 + 3)
    assert "accuracy" not in second  # it has not ended
    assert timeline.epochs([], 0) == []


def test_short_steps_of_different_length_are_not_waits() -> None:
    assert not any(timeline.waits([row(1, 0.001), row(2, 0.001), row(3, 0.05)]))
    assert timeline.speed([]) is None


def test_first_difference_ignores_times_and_notices_missing_rows() -> None:
    other = [dict(row, seconds=7.0, images_per_second=1.0) for row in RUN]
    assert timeline.first_difference(RUN, other) is None
    assert timeline.first_difference(RUN, other[:-1]) == 8
    other[2] = other[2] | {"loss": 1.25}
    assert timeline.first_difference(RUN, other) == 3
    assert timeline.largest_loss_difference(RUN, other) == 0.25


def test_goals_are_reached_at_the_first_epoch_that_is_good_enough() -> None:
    assert timeline.reached([90.0, 96.0, 97.0], [10.0, 20.0, 30.0], 96) == 20
    assert timeline.reached([90.0], [10.0], 96) is None


def test_autotuning_results_are_compared_without_their_times() -> None:
    def results(algorithm: int, nanos: int) -> str:
        return f"""version: 3
results {{
  device: "H100"
  hlo: "(f32[8]) custom-call()"
  result {{
    run_time {{
      nanos: {nanos}
    }}
    gemm {{
      algorithm: {algorithm}
    }}
  }}
}}
"""

    assert timeline.same_algorithms(results(5, 100), results(5, 90)) == {"kernels": 1, "different": 0, "only_in_one": 0}
    assert timeline.same_algorithms(results(5, 100), results(6, 100))["different"] == 1
    assert timeline.same_algorithms(results(5, 100), "version: 3\n")["only_in_one"] == 1
