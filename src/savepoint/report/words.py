"""How the page says numbers and times."""

import math
from datetime import UTC, datetime

from savepoint.report.curves import SHARE


def measured(value: float, unit: str = "") -> str:
    if unit and math.isfinite(value):
        return f"{value:.2f}{unit}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:.3g}"


def metric(name: str, value: float) -> str:
    """Of a metric: an accuracy as a percentage, as in the charts."""
    is_share = SHARE.fullmatch(name.split("/")[-1]) and 0 <= value <= 1
    return measured(100 * value, " %") if is_share else measured(value)


def count(steps: float) -> str:
    """A number of steps, as short as a tick has to be: 1,290, 40k, 2.5M."""
    if steps < 20_000:
        return f"{steps:,.0f}"
    return f"{steps / 1e6:g}M" if steps >= 1e6 else f"{steps / 1e3:g}k"


def moment(time: str) -> str:
    """An ISO time, in UTC, to the minute; what is no time as it is."""
    try:
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError):
        return time


def duration(secs: float) -> str:
    if secs < 60 or not math.isfinite(secs):
        return f"{secs:.1f} s"
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"
