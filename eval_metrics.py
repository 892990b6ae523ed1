"""Rank-k (CMC), mAP and mINP, as the field computes them.

mAP: mean average precision (Zheng et al., "Scalable Person Re-identification", ICCV 2015). mINP: mean inverse
negative penalty (Ye et al., "Deep Learning for Person Re-identification", TPAMI 2021): the number of correct matches
divided by the rank of the last one.

Only the ranks of the correct matches count, so images are not carried through a ranking: distances are sorted as plain
numbers, and a match ranks where its distance stands among them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from utils import full_precision

CHUNK = 2**22  # entries of the distance matrix that are ranked at a time: bounds the memory


class CosineDistances:
    """Negative cosine similarities [Q, G] of features of unit length, query [Q, C] and gallery [G, C] (torch).

    They are computed on access, row by row: for the measures below, a distance matrix that takes no memory.
    """

    def __init__(self, query: torch.Tensor, gallery: torch.Tensor) -> None:
        self.query, self.gallery = query, gallery
        self.shape, self.device = (len(query), len(gallery)), query.device

    def __getitem__(self, rows):
        return -self.query[rows] @ self.gallery.T


Distances = np.ndarray | torch.Tensor | CosineDistances
Labels = np.ndarray | torch.Tensor | Sequence[int]


class Rules(NamedTuple):
    """What counts as a match in a data set.

    not_seen(q_pids, q_camids, g_pids, g_camids), of labels that broadcast -> bool: gallery images that the query does
    not see; None: it sees everything. unseen: the same in words. counts_identities: whether the CMC counts identities,
    each at its nearest image, or images.
    """

    not_seen: Callable | None
    unseen: str | None
    counts_identities: bool


SYSU_RULES = Rules(
    not_seen=lambda q_pids, q_camids, g_pids, g_camids: (q_camids == 3) & (g_camids == 2),  # they share their place
    unseen="camera 2 by queries of camera 3",
    counts_identities=True,
)
REGDB_RULES = Rules(not_seen=None, unseen=None, counts_identities=False)


def eval_sysu(
    distmat: Distances, q_pids: Labels, g_pids: Labels, q_camids: Labels, g_camids: Labels, max_rank: int = 20
) -> tuple[np.ndarray, float, float]:
    """SYSU-MM01's measure -> (cmc [max_rank], mAP, mINP), a float64 NumPy array and two floats, all from 0 to 1.

    distmat [Q, G]: finite distances, smaller is nearer: NumPy, torch or `CosineDistances`. They are ranked on their
    device. q_pids, q_camids [Q] and g_pids, g_camids [G]: identities and cameras, integers. Equal distances rank in
    gallery order. A query of camera 3 does not see gallery images of camera 2, which stands in the same place. The CMC
    counts identities: each is ranked by its nearest image. mAP and mINP count images. Queries without a match are
    skipped.

    Raises ValueError for shapes that disagree, distances that are not finite, or no query with a match.
    """
    return match_ranks(SYSU_RULES, distmat, q_pids, g_pids, q_camids, g_camids).means(max_rank)


def eval_regdb(
    distmat: Distances, q_pids: Labels, g_pids: Labels, max_rank: int = 20
) -> tuple[np.ndarray, float, float]:
    """RegDB's measure; as `eval_sysu`, but every query sees the whole gallery, and the CMC counts images."""
    return match_ranks(REGDB_RULES, distmat, q_pids, g_pids).means(max_rank)


class MatchRanks(NamedTuple):
    """The ranks of the matches of the E queries that have one, on the distances' device.

    rows [E]: the queries. first [E]: rank of the first match, from 1, among identities or images (see `Rules`).
    positions [E, M]: ranks of all matches among images, from 1, ascending; 0 where a query has fewer than M.
    """

    rows: torch.Tensor
    first: torch.Tensor
    positions: torch.Tensor

    def cmc(self, max_rank=20):
        """Share of the queries with a match among the first 1 .. max_rank: float64 [max_rank]."""
        hits = torch.bincount(self.first[self.first <= max_rank] - 1, minlength=max_rank).cumsum(0)
        return hits.double() / len(self.first)

    def average_precision(self):
        """Of each query: float64 [E]."""
        return self._precision().sum(dim=1) / self._matches()

    def inverse_negative_penalty(self):
        """Of each query: float64 [E]."""
        return self._matches() / self.positions.amax(dim=1)

    def precision_at_recall(self, points=11):
        """Mean over the queries of the best precision at a recall of at least 0 .. 1, in equal steps: float64 [points].

        Source: the interpolated precision of TREC (Manning et al., "Introduction to Information Retrieval", 8.4).
        """
        precision = self._precision()
        best = precision.flip(1).cummax(dim=1).values.flip(1)
        levels = torch.linspace(0, 1, points, dtype=torch.float64, device=best.device)
        # The match that reaches a recall. The small step back keeps 0.1 x 10 from becoming the eleventh.
        needed = (levels * self._matches()[:, None] - 1e-9).ceil().long().clamp_min(1)
        return best.gather(1, needed - 1).mean(dim=0)

    def means(self, max_rank: int) -> tuple[np.ndarray, float, float]:
        """(cmc [max_rank], mAP, mINP), as `eval_sysu` returns them."""
        cmc = self.cmc(max_rank).cpu().numpy()
        return cmc, self.average_precision().mean().item(), self.inverse_negative_penalty().mean().item()

    def _matches(self):
        return (self.positions > 0).sum(dim=1).double()

    def _precision(self):
        """Precision at each match, 0 where there is none: float64 [E, M]."""
        number = torch.arange(1, self.positions.shape[1] + 1, device=self.positions.device)
        return torch.where(self.positions > 0, number / self.positions.clamp_min(1).double(), 0)


def match_ranks(
    rules: Rules,
    distmat: Distances,
    q_pids: Labels,
    g_pids: Labels,
    q_camids: Labels | None = None,
    g_camids: Labels | None = None,
) -> MatchRanks:
    """Rank each query's matches by `Rules` -> `MatchRanks`.

    Arguments and errors are those of `eval_sysu`. Cameras are needed where the rules hide something.
    """
    distmat = distmat if isinstance(distmat, CosineDistances) else torch.as_tensor(distmat)
    query, gallery = ([q_pids, q_camids], [g_pids, g_camids]) if rules.not_seen else ([q_pids], [g_pids])
    query, gallery = ([torch.as_tensor(x, device=distmat.device) for x in labels] for labels in (query, gallery))
    for q, g in zip(query, gallery, strict=True):
        if tuple(distmat.shape) != (*q.shape, *g.shape):
            shapes = f"{list(distmat.shape)} do not fit labels of shape {list(q.shape)} and {list(g.shape)}"
            raise ValueError(f"distances of shape {shapes}")
    if not (len(query[0]) and len(gallery[0])):
        raise ValueError("no queries, or an empty gallery")
    images, grouped, blocks = distmat.shape[1], _Grouped(gallery[0]), []
    for rows in torch.arange(len(query[0]), device=distmat.device).split(max(1, CHUNK // images)):
        distances = distmat[rows]
        # Infinity marks what is not seen, so integers become floats: of 64 bits, as 32 would merge some of them.
        distances = full_precision(distances if distances.is_floating_point() else distances.double())
        if not torch.isfinite(torch.stack(torch.aminmax(distances))).all():
            raise ValueError("the distances are not all finite")
        if rules.not_seen:
            distances = distances.masked_fill(rules.not_seen(*(q[rows, None] for q in query), *gallery), torch.inf)
        index = grouped.matches(query[0][rows])
        matches = distances.gather(1, index.clamp_min(0)).masked_fill(index < 0, torch.inf)
        some = (matches < torch.inf).any(dim=1)
        if not some.all():
            rows, distances, index, matches = rows[some], distances[some], index[some], matches[some]
        if not len(rows):
            continue
        positions = _positions(distances, index, matches).sort(dim=1).values
        first = positions[:, 0]
        if rules.counts_identities:
            first = _identities_before(distances, grouped, index, matches) + 1
        blocks.append((rows, first, positions.masked_fill(positions > images, 0)))
    if not blocks:
        raise ValueError("no query has a match in the gallery")
    rows, first, positions = zip(*blocks, strict=True)
    most = max(block.shape[1] for block in positions)
    positions = [torch.nn.functional.pad(block, (0, most - block.shape[1])) for block in positions]
    return MatchRanks(torch.cat(rows), torch.cat(first), torch.cat(positions))


class _Grouped:
    """A gallery's images by identity.

    identities [I]: sorted. group [G]: index of each image's identity. order [G]: the images, group by group; start [I],
    size [I]: of each group in that order.
    """

    def __init__(self, g_pids):
        self.identities, self.group, self.size = torch.unique(g_pids, return_inverse=True, return_counts=True)
        self.order = self.group.argsort()
        self.start = self.size.cumsum(0) - self.size

    def matches(self, q_pids):
        """Images of each query's identity, padded with -1: [B, M]."""
        group = torch.searchsorted(self.identities, q_pids).clamp_max(len(self.identities) - 1)
        size = self.size[group].masked_fill(self.identities[group] != q_pids, 0)
        number = torch.arange(int(size.max()), device=size.device)
        place = (self.start[group, None] + number).clamp_max(len(self.order) - 1)
        return self.order[place].masked_fill(number >= size[:, None], -1)

    def nearest(self, distances):
        """Distance of each identity's nearest image: [B, G] -> [B, I]."""
        if distances.device.type == "cpu":  # NumPy's is many times faster there
            by_group = distances[:, self.order].numpy()
            return torch.from_numpy(np.minimum.reduceat(by_group, self.start.numpy(), axis=1))
        nearest = distances.new_full((len(distances), len(self.identities)), torch.inf)
        return nearest.scatter_reduce_(1, self.group.expand_as(distances), distances, "amin")


def _positions(distances, index, matches):
    """Ranks, from 1, of images `index` [B, M] at distances `matches` (inf: none, last) among distances [B, G]."""
    cpu = distances.device.type == "cpu"  # NumPy's sort of plain numbers is many times faster there
    ranking = torch.from_numpy(np.sort(distances.numpy(), axis=1)) if cpu else distances.sort(dim=1).values
    position = torch.searchsorted(ranking, matches) + 1
    tie = (torch.searchsorted(ranking, matches, right=True) > position) & (matches < torch.inf)
    for entries in tie.nonzero().split(max(1, len(distances))):
        row, column = entries.unbind(dim=1)
        earlier = _equal_before(distances[row], matches[row, column], index[row, column])
        position[row, column] += earlier.sum(dim=1)
    return position.masked_fill(matches == torch.inf, distances.shape[1] + 1)


def _identities_before(distances, grouped, index, matches):
    """Number of identities whose nearest image ranks before the nearest match: [B]."""
    nearest, own = grouped.nearest(distances), matches.amin(dim=1)
    before = (nearest < own[:, None]).sum(dim=1)
    tie = (nearest == own[:, None]).sum(dim=1) > 1
    if tie.any():
        images = distances.shape[1]
        distances, nearest, own, index, matches = (x[tie] for x in (distances, nearest, own, index, matches))
        first = index.masked_fill(matches != own[:, None], images).amin(dim=1)
        earlier = torch.zeros_like(nearest, dtype=torch.uint8)
        equal = _equal_before(distances, own, first).byte()
        earlier.scatter_reduce_(1, grouped.group.expand_as(distances), equal, "amax")
        before[tie] += (earlier.bool() & (nearest == own[:, None])).sum(dim=1)
    return before


def _equal_before(distances, distance, index):
    """Images [B, G] at exactly `distance` [B] that stand before image `index` [B] in the gallery."""
    earlier = torch.arange(distances.shape[1], device=distances.device) < index[:, None]
    return (distances == distance[:, None]) & earlier
