"""Runs that train: as commands of their own, and ended before they are done."""

import signal
import subprocess
import time


class Killed(BaseException):
    """Stands for the end of the process."""


def stop_after(step):
    """Return a callback of a training that ends it after a step."""

    def on_point(point):
        if point.step == step:
            raise Killed

    return on_point


def finished(line, **how):
    """Run a command to its end; it must succeed."""
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def kill_once_saved(line, states, **how):
    """Run a command, and kill it (-9) as soon as it has saved a state."""
    running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    until = time.monotonic() + 300
    while not list(states.glob("*/state")) and time.monotonic() < until:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(list(states.glob("*/state"))) == 1


def learned_masks(text_file):
    """Return the words of a run that learns masks in two steps."""
    return [
        "-m", "maskllm", "--set", f"train_data=file:{text_file}", "--set", "steps=2",
        "--set", "batch=2", "--set", "train_seqlen=32", "--set", "held_out=2",
        "--set", "prior=magnitude",
    ]  # fmt: skip
