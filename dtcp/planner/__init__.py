"""The planner: bytes, memory and time of a run, before there are ranks to run it on."""
