"""What train.py is made of: launching, data, progress, verification, configs.

The modules that build on torchtitan import `dtcp.torchtitan` first, whose shim must come before
torchtitan; the others (launch, compiler, sources, plot, report) do without it.
"""
