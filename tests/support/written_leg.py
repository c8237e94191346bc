"""A leg of a profile whose trace and metrics are written by hand."""

from asyncflow.metrics.tracing import Span
from asyncflow.profile.read import Memory, Window, read_leg

PERIOD_S, COLLECT_S, UPDATE_S, LOG_S = 10.0, 6.0, 3.5, 0.5
WINDOW = Window(num_warmup=1, num_updates=2)


def standard_spans(num_updates):
    """Collect for 6 s (two decisions: 1 s of inference, 2 s of simulating), update 3 s, publish 0.5 s, log 0.5 s."""
    spans = []
    for k in range(num_updates):
        t = PERIOD_S * k
        spans += [
            Span("trainer", "wait_data", t, t + COLLECT_S, {}),
            Span("collector", "collect", t, t + COLLECT_S, {}),
            Span("collector", "wait_slot", t, t, {}),
            Span("trainer", "update", t + 6.0, t + 9.0, {}),
            Span("trainer", "publish", t + 9.0, t + 9.5, {}),
        ]
        for step in range(2):
            start = t + 3.0 * step
            spans.append(Span("collector", "inference", start, start + 1.0, {}))
            spans.append(Span("collector", "env_step", start + 1.0, start + 3.0, {}))
            numbers = {"rollout": k, "step": step, "group": 0}
            spans.append(Span("worker 0", "chunk", start + 1.0, start + 2.5, numbers))
            spans.append(Span("worker 1", "chunk", start + 1.5, start + 3.0, numbers))
    return sorted(spans, key=lambda span: span.start_s)


def rows(num_updates, lag=0, decisions=8, trained=8, dropped=0):
    return [
        {
            "staleness/policy_lag_mean": lag,
            "decisions": decisions * (k + 1),
            "buffer/trained": trained * (k + 1),
            "buffer/dropped": dropped * (k + 1),
        }
        for k in range(num_updates)
    ]


def read(mode="standard", **row):
    return read_leg(mode, WINDOW, standard_spans(3), rows(3, **row), Memory(1, 2, 3))
