"""Context parallelism: attention over a sequence that no single device holds."""

from longspan.context.attend import attention, prepare, shard, unshard
from longspan.context.run import attend
from longspan.context.sequence import SequenceContext

__all__ = ["SequenceContext", "attend", "attention", "prepare", "shard", "unshard"]
