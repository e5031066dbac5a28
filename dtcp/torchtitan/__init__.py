"""The adapter: models, plans and losses of ours as torchtitan's Trainer takes them.

`compat` comes first: torchtitan binds its device when it is imported.
"""

from dtcp.torchtitan import compat as compat
