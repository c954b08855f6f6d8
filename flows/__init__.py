"""Runs the method in Prefect: schedules, failures and the dashboard. No line of the method is here.

Uses the server that PREFECT_API_URL names. Without one it uses Prefect's temporary server.
"""

import logging
import os

# Set before the flows are imported, because Prefect reads these only then. A user's own value is kept.
for _name, _value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # the default, 20, is short for a busy laptop
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "TQDM_DISABLE": "1",  # progress bars of libraries would break up the log
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cat_grpo,flows",  # the dashboard shows our log lines with the run
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # an engine's thread logs outside of any run
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "WARNING",  # the dashboard shows which have completed
}.items():
    os.environ.setdefault(_name, _value)

for _name in ("cat_grpo", "flows"):  # Prefect gives these its handler but no level
    logging.getLogger(_name).setLevel(logging.INFO)
