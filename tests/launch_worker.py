"""A worker with the contract of `copus.worker` and without torch: it counts samples and writes the events of a run.

Runs below the elastic agent or alone. What it shall do comes before the run directory: `--steps N` samples in all,
`--step-seconds S`, `--fail-at STEP` (a failure event, then exit 1), `--crash-at STEP` (no event), `--user-error-at
STEP` (0: before training), `--ignore-stop`. Each start adds a line to the file `starts-RANK` beside the run.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from copus.branches import read_plan
from copus.event_log import EventLog
from copus.events import Branch, Checkpoint, End, Evaluate, Failure, Noise, Profile, Start, Step, read_events
from copus.job import JobError, load_job
from copus.manifest import describe, write_manifest
from copus.user_errors import EXIT_CODE, report_failure
from profiles.noise_scale import NoiseScale

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--step-seconds", type=float, default=0.01)
parser.add_argument("--fail-at", type=int)
parser.add_argument("--crash-at", type=int)
parser.add_argument("--user-error-at", type=int)
parser.add_argument("--ignore-stop", action="store_true")
parser.add_argument("run", type=Path)
parser.add_argument("--profile-only", action="store_true")
options = parser.parse_args()

run, rank = options.run, int(os.environ.get("RANK", 0))
terminated = False


def on_sigterm(number: int, frame: object) -> None:
    global terminated
    terminated = True


signal.signal(signal.SIGTERM, signal.SIG_IGN if options.ignore_stop else on_sigterm)
(run / f"worker-{rank}.pid").write_text(str(os.getpid()))
with open(run.parent / f"starts-{rank}", "a") as starts:
    starts.write("started\n")


def stop_asked() -> bool:
    return terminated or (not options.ignore_stop and (run / "stop").exists())


if rank > 0:  # only the first rank writes events; the others run along
    for step in range(options.steps):
        if step + 1 == options.crash_at:
            print("RuntimeError: rank 1 is out of luck", file=sys.stderr)
            sys.exit(3)
        if stop_asked():
            break
        time.sleep(options.step_seconds)
    sys.exit(0)

job = load_job(run / "job.yaml")
configuration = job.training.configuration
checkpoint = run / "checkpoints" / "done"
done = int(checkpoint.read_text()) if checkpoint.exists() else 0
batch = configuration.global_batch
log = EventLog(run)
plan = read_plan(run)
if plan is not None:  # a calibration: losses of a critical batch of 24, with what an order of the data does to all
    ran = [event for event in read_events(run) if isinstance(event, Branch)]
    known = {(event.configuration, event.seed) for event in ran}
    noise = NoiseScale(grad_sq=1.0, noise_trace=8.0, value=8.0, low=6.0, high=10.0, samples=50)
    position = {"step": 7, "samples_consumed": 100}
    for seed in plan.seeds:
        for each in plan.configurations:
            if (each, seed) in known:
                continue
            known.add((each, seed))
            drop = (0.3 + 0.01 * (seed % 3)) / (1 + each.global_batch / 24)
            branch = Branch(
                **position,
                done=len(known),
                total=len(plan.seeds) * len(plan.configurations),
                configuration=each,
                seed=seed,
                sequences=plan.sequences,
                lr=1e-3,
                first_loss=3.0,
                last_loss=float("nan") if each.global_batch > 100 else 3.0 - drop,
                noise=noise,
            )
            log.write(branch)
            if len(known) == options.fail_at:
                log.write(Failure(**position, rank=0, message="the machine is gone"))
                sys.exit(1)
    log.write(End(**position, reason="finished", seconds=1.0))
    sys.exit(0)
if options.profile_only:
    for number in range(1, 4):
        position = {"step": 0, "samples_consumed": 0}
        log.write(Profile(**position, configuration=configuration, done=number, total=3, step_seconds=0.1 * number))
    log.write(End(step=0, samples_consumed=0, reason="finished", seconds=0.1))
    sys.exit(0)


def complain_at(step: int) -> None:
    if step == options.user_error_at:
        sys.exit(EXIT_CODE if report_failure(JobError("training.lr(0): too little"), log, rank) else 1)


complain_at(0)
log.write(
    Start(
        step=done,
        samples_consumed=done * batch,
        configuration=configuration,
        total_samples=job.total_samples,
        seq_len=job.model.seq_len,
        resumed_from="checkpoints/done" if done else None,
        hardware="none",
        software="none",
    )
)
reason = "finished"
while done < options.steps:
    if stop_asked():
        reason = "interrupted"
        break
    time.sleep(options.step_seconds)
    done += 1
    position = {"step": done, "samples_consumed": done * batch}
    complain_at(done)
    if done == options.fail_at:
        log.write(Failure(**position, rank=0, message="the loss is [not] finite"))
        print("Traceback: what the rank said last", file=sys.stderr)
        sys.exit(1)
    if done == options.crash_at:
        sys.exit(0)  # this rank is told by the agent that another one died
    loss = 6.0 / (1 + done)
    log.write(Step(**position, loss=loss, grad_norm=1.0, lr=1e-3, beta2=0.95, seconds=0.01, global_batch=batch))
    noise = NoiseScale(grad_sq=1.0, noise_trace=8.0, value=8.0, low=6.0, high=None, samples=done)
    log.write(Noise(**position, value=8.0, low=6.0, high=None, noise=noise, parts=2, part_size=1))
    log.write(Evaluate(**position, loss=loss + 0.5, sequences=4, seconds=0.01))
checkpoint.parent.mkdir(exist_ok=True)
checkpoint.write_text(str(done))
whole = checkpoint.with_name(f"samples-{done * batch:012d}")  # what the launcher looks at
whole.mkdir(exist_ok=True)
(whole / "trainer.json").write_text("{}")
write_manifest(whole, describe(whole, ["trainer.json"]))
position = {"step": done, "samples_consumed": done * batch}
log.write(Checkpoint(**position, path="checkpoints/done", seconds=0.0, bytes=1))
log.write(End(step=done, samples_consumed=done * batch, reason=reason, seconds=1.0))
