"""From a config to a finished run: checking, executing, campaigns, estimates, the doctor."""
