"""Rank-k (CMC), mAP and mINP of SYSU-MM01, RegDB and LLCM, as the field computes them.

mAP: mean average precision (Zheng et al., "Scalable Person Re-identification", ICCV 2015). mINP: mean inverse
negative penalty (Ye et al., "Deep Learning for Person Re-identification", TPAMI 2021): the number of correct matches
over the rank of the last one.
"""

import torch

CHUNK = 2**22  # entries of the distance matrix that are ranked at a time: bounds the memory


def eval_sysu(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20):
    """SYSU-MM01's measure -> (cmc [max_rank], mAP, mINP), a float64 NumPy array and two floats, all from 0 to 1.

    distmat [Q, G]: distances, finite, smaller is nearer; q_pids, q_camids [Q] and g_pids, g_camids [G]: identities and
    cameras, integers. NumPy or torch; the ranking runs on distmat's device. Equal distances rank in gallery order.
    A query of camera 3 does not see gallery images of camera 2, which stands in the same place. The CMC counts
    identities: each is ranked by its nearest image. mAP and mINP count images. Queries without a match are skipped.

    Raises ValueError for shapes that disagree, distances that are not finite, or no query with a match.
    """
    q_camids, g_camids = torch.as_tensor(q_camids), torch.as_tensor(g_camids)
    same_place = (q_camids[:, None] == 3) & (g_camids[None, :] == 2)
    return _evaluate(distmat, q_pids, g_pids, same_place, max_rank, count_identities=True)


def eval_regdb(distmat, q_pids, g_pids, max_rank=20):
    """RegDB's measure; as `eval_sysu`, but every query sees the whole gallery, and the CMC counts images."""
    return _evaluate(distmat, q_pids, g_pids, None, max_rank, count_identities=False)


def eval_llcm(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20):
    """LLCM's measure; as `eval_sysu`, but what a query does not see are the images of its own identity and camera.

    Source: Zhang and Wang, "Diverse Embedding Expansion Network and Low-Light Cross-Modality Benchmark for
    Visible-Infrared Person Re-identification", CVPR 2023. Its cameras take both modalities.
    """
    q_pids, g_pids, q_camids, g_camids = (torch.as_tensor(x).cpu() for x in (q_pids, g_pids, q_camids, g_camids))
    same_shot = (q_pids[:, None] == g_pids[None, :]) & (q_camids[:, None] == g_camids[None, :])
    return _evaluate(distmat, q_pids, g_pids, same_shot, max_rank, count_identities=True)


def _evaluate(distmat, q_pids, g_pids, hidden, max_rank, count_identities):
    distmat = torch.as_tensor(distmat)
    device = distmat.device
    q_pids, g_pids = torch.as_tensor(q_pids, device=device), torch.as_tensor(g_pids, device=device)
    shape = (len(q_pids), len(g_pids))
    if distmat.shape != shape or (hidden is not None and hidden.shape != shape):
        raise ValueError(
            f"distances of shape {tuple(distmat.shape)} do not fit {shape[0]} queries and {shape[1]} images"
        )
    if not distmat.numel():
        raise ValueError("no queries, or an empty gallery")
    if not torch.isfinite(distmat).all():
        raise ValueError("the distances are not all finite")
    # Identities as 0 .. I-1 in both lists, so that they can index.
    identities, g_ids = torch.unique(g_pids, return_inverse=True)
    hidden = torch.zeros((), dtype=torch.bool, device=device) if hidden is None else hidden.to(device)
    hidden = hidden.expand(distmat.shape)

    found_at, precision, penalty = [], [], []
    for rows in torch.arange(len(distmat), device=device).split(max(1, CHUNK // max(1, distmat.shape[1]))):
        order = distmat[rows].sort(dim=1, stable=True).indices
        keep = ~hidden[rows].gather(1, order)
        match = keep & (g_pids[order] == q_pids[rows, None])
        seen = match.any(dim=1)
        order, keep, match = order[seen], keep[seen], match[seen]
        position = keep.cumsum(dim=1)  # rank among the images that the query sees, from 1
        hits = match.cumsum(dim=1)
        relevant = hits[:, -1].double()
        precision.append((match * hits / position.clamp_min(1).double()).sum(dim=1) / relevant)
        penalty.append(relevant / (match * position).amax(dim=1))
        own_first = position.masked_fill(~match, distmat.shape[1] + 1).amin(dim=1)
        if count_identities:
            first = position.new_full((len(order), len(identities)), distmat.shape[1] + 1)
            position = position.masked_fill(~keep, distmat.shape[1] + 1)
            first.scatter_reduce_(1, g_ids[order], position, "amin")
            found_at.append((first < own_first[:, None]).sum(dim=1))
        else:
            found_at.append(own_first - 1)
    found_at = torch.cat(found_at) if found_at else torch.empty(0)
    if not len(found_at):
        raise ValueError("no query has a match in the gallery")
    found = torch.bincount(found_at[found_at < max_rank], minlength=max_rank).cumsum(0)
    cmc = found.double() / len(found_at)
    return cmc.cpu().numpy(), torch.cat(precision).mean().item(), torch.cat(penalty).mean().item()
