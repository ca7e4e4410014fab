"""`copus audit`: was adapting worth it, what did it cost, and did predictions come true? By the run's own data."""

from copus.audit import audit_run
from copus.job import JobError
from launch.json_output import as_json_line
from launch.run_directory import find_run, shown
from profiles.audit import Audit, Estimate
from profiles.configuration import Configuration
from profiles.formatting import duration, percent, signed_percent, signed_percent_interval


def audit(run_text: str | None, *, as_json: bool = False) -> int:
    """Print the audit of a run, which may still be going on. Raises JobError if it has not trained."""
    run = find_run(run_text)
    audited = audit_run(run)
    if audited.first is None:
        raise JobError(f"{shown(run)}: nothing has been trained yet")
    if as_json:
        print(as_json_line({"run": str(run), **audited.model_dump(mode="json")}))
    else:
        print("\n".join(audit_lines(audited)))
    return 0


def audit_lines(audited: Audit) -> list[str]:
    """The audit in a few lines for people: a heading, then a name and a finding in each."""
    return [
        "audit: speed to the same progress, with 90 % intervals",
        *(f"  {a:<14} {b}" for a, b in audit_facts(audited)),
    ]


def audit_facts(audited: Audit) -> list[tuple[str, str]]:
    """Name and value of every finding."""
    if audited.best_fixed is None:
        facts = [("gain", "unknown: the noise scale, or every step time, is")]
    else:
        facts = _gains(audited, audited.best_fixed)
    costs = [
        f"{audited.trials} trial{'s' * (audited.trials != 1)} took {duration(audited.trial_seconds)}{_share(audited)}",
        f"{audited.moves} move{'s' * (audited.moves != 1)} took {duration(audited.move_seconds)}",
    ]
    if audited.restart_seconds:
        costs.append(f"restarts took {duration(audited.restart_seconds)}")
    facts.append(("cost", ", ".join(costs)))
    if audited.measuring_seconds:
        facts.append(("measuring", f"{duration(audited.measuring_seconds)} before training{_with_measuring(audited)}"))
    return [*facts, ("predictions", _predictions(audited))]


def _gains(audited: Audit, best: Configuration) -> list[tuple[str, str]]:
    """The comparisons with other ways to the same progress."""
    first, over_best, regret = (
        audited.gain_over_first_pct,
        audited.gain_over_best_fixed_pct,
        audited.regret_to_best_schedule_pct,
    )
    assert audited.first is not None, "something trained"
    assert over_best is not None, "there is a best fixed one"
    assert regret is not None, "there is a best fixed one"
    over_first = "unknown: no step of {} was timed" if first is None else f"{_interval(first)} over {{}}"
    note = "" if audited.best_fixed_ran else ", which never ran: predicted"
    return [
        ("vs first", over_first.format(audited.first.label)),
        ("vs best fixed", f"{_interval(over_best)} over {best.label}{note}"),
        ("regret", f"{_interval(regret)} time over the best schedule of hindsight"),
    ]


def _interval(estimate: Estimate) -> str:
    """`+5.1 % (+1.2 to +9.8)`."""
    return signed_percent_interval(*(part / 100 for part in (estimate.value, estimate.low, estimate.high)))


def _share(audited: Audit) -> str:
    if not audited.trial_seconds or not audited.training_seconds:
        return ""
    return f" ({percent(audited.trial_seconds / audited.training_seconds)} of training)"


def _with_measuring(audited: Audit) -> str:
    """What is left of the gain over the first configuration, which needs no measuring, if that is counted too."""
    gain = audited.gain_over_first_pct
    if gain is None or not audited.compared_seconds:
        return ", in none of these figures"
    share = audited.compared_seconds / (audited.compared_seconds + audited.measuring_seconds)
    return f"; with it {signed_percent((1 + gain.value / 100) * share - 1)} over the first"


def _predictions(audited: Audit) -> str:
    checked = audited.predictions
    if checked.mape_pct is None or checked.coverage_pct is None:
        return "none was checked: the job never moved"
    times = f"{checked.count} step time{'s' * (checked.count != 1)} off by {percent(checked.mape_pct / 100)} on average"
    return f"{times}, {percent(checked.coverage_pct / 100)} within their 80 % interval"
