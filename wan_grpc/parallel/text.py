"""The prompts of a request on different ranks, encoded at the same time and then given to all.

Knows which ranks encode which text. Does not know how a text is encoded, nor which prompts are remembered.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from wan_grpc.domain.traffic import Exchange
from wan_grpc.parallel.mesh import Mesh


class TextSplit:
    """Gives each text to one of the mesh's groups for text, in turn. Collective: all ranks have the same texts."""

    def __init__(self, mesh: Mesh, blank: Callable[[], torch.Tensor]) -> None:
        """blank: makes a tensor to receive an embedding: the same shape and dtype on every rank."""
        self._mesh = mesh
        self._blank = blank

    def __call__(self, texts: Sequence[str], encode: Callable[[str], torch.Tensor]) -> Iterator[torch.Tensor]:
        """The embeddings of all texts, in order: the very values on every rank.

        With the first, this rank computes all that fall to it, so that no group waits for another one's text before it
        begins its own.

        Raises:
            ExchangeBrokenError: another rank is gone.
        """
        groups = self._mesh.topology.text_groups
        turns = [groups[index % len(groups)] for index in range(len(texts))]
        mine = {
            index: encode(text)
            for index, (text, ranks) in enumerate(zip(texts, turns, strict=True))
            if self._mesh.rank in ranks
        }
        for index, ranks in enumerate(turns):
            embedding = mine.pop(index) if index in mine else self._blank()
            yield self._mesh.world.broadcast(embedding, source=ranks[0], kind=Exchange.TEXT)
