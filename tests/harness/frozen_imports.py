"""Imported last by the fork server: what it has imported is nothing that ranks may collect.

Some two million objects of torch and transformers would be looked at by each full collection of
each rank, and their pages copied.
"""

import gc

gc.collect()
gc.freeze()
