"""Every private name of torch that dtcp uses, a function or constant each, with why it is needed.

A file per subject of torch. Versions in parentheses are those of torch in which the name was read.
Nothing else in dtcp, models or parallelize spells a private name of torch; tests/test_imports.py
holds that.
"""
