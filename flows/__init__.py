"""Prefect: what runs when, what fails how, what the dashboard shows. No line of the method is here.

Works against the server that PREFECT_API_URL names, and without one on Prefect's temporary server.
"""

import logging
import os

# Prefect reads these once, when it is first imported: so here, ahead of the flows. Who set one keeps it.
for _name, _value in {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # the default, 20, is short for a busy laptop
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "TQDM_DISABLE": "1",  # bars that libraries draw would stand between the lines of a log
    "PREFECT_LOGGING_EXTRA_LOGGERS": "cat_grpo,flows",  # our log lines stand beside the run in the dashboard
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # and those of an engine's thread belong to no run
    "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "WARNING",  # the dashboard shows which have completed
}.items():
    os.environ.setdefault(_name, _value)

for _name in ("cat_grpo", "flows"):  # Prefect gives these its handler and no level
    logging.getLogger(_name).setLevel(logging.INFO)
