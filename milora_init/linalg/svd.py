"""The r singular triplets of one part of a weight's spectrum, in float64, with a certificate.

What. W (m, n) = U diag(s) V^T. `singular_triplets` returns r columns of U and V and their s, chosen by `mode`: the
smallest ("min", what MiLoRA adapts), the largest ("max"), the middle ("mid"), or a random draw ("random").

How. X is W or its transpose, with p rows >= q columns. The eigenvectors of the Gram matrix G = X^T X are the right
singular vectors of X, and G is (q, q) whatever p is. For the largest triplets a Krylov space of G is built, applied as
X^T (X v) or as G v, whichever costs less; for the smallest one of (G - shift I)^-1, by a Cholesky factor. Interior
triplets, small matrices and large r take all the eigenvectors of G (cost.py has the limits). Both ends are computed in
float32 first and corrected in float64: on a GPU by mixed_precision.py, on a CPU by corrected_lanczos.py. One
Rayleigh-Ritz step in X itself (a QR of X V and the SVD of its small factor) then gives s and U from the weight, not
from its square.

Precision. float64: the upcast of a checkpoint's bfloat16, float16 or float32 is exact, and float64 has the digits that
the squared condition number of G costs (s is good to about eps * s_max^2 / (2 s)). A float32 SVD is not accurate
enough: its error is relative to the largest singular value, which in a language model is 10^4 to 10^6 times the
smallest. float32 serves where its error does not reach the result: to place the shift, and to find a first guess.

Cost. p q^2 operations for G and q^3 / 3 for its factor, then 4 q^2 for each of some hundreds of vectors; 9 q^3 where
all eigenvectors are needed. 1.5 q^2 float64 numbers of memory and the Krylov basis; 3 q^2 for all eigenvectors. X is
upcast one block of rows at a time.

Reproducibility. The same bits on the same processor with the same number of threads. A BLAS splits its sums by that
number, so the program solves each weight on one thread.

Failure. Every solution is measured against W (certificate.py). One that is not accepted is refined by one more
application of the operator; then the next algorithm is tried: after mixed precision float64; then all eigenvectors of
G; then, where squaring lost the wanted end, a full float64 SVD, which holds a float64 copy of W. The same happens when
LAPACK, cuSOLVER or cuBLAS fails. The certificate says which algorithm ran and why.

Sources: MiLoRA, https://arxiv.org/abs/2406.09044; the Krylov space: lanczos.py; the error bound: certificate.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from milora_init.linalg.arithmetic import DeviceArithmetic, arithmetic_of
from milora_init.linalg.blocked_matrix import BlockedMatrix, Operator
from milora_init.linalg.certificate import (
    EPS,
    Certificate,
    Gaps,
    NotConverged,
    Solution,
    certify,
    gaps_in,
    is_accepted,
)
from milora_init.linalg.cholesky import CholeskyFactor
from milora_init.linalg.corrected_lanczos import corrected_triplets, rotated
from milora_init.linalg.cost import uses_krylov
from milora_init.linalg.lanczos import (
    RitzPairs,
    largest_eigenpairs,
    largest_eigenvalues,
    power_projection,
    spectral_norm,
)
from milora_init.linalg.mixed_precision import extreme_triplets
from milora_init.linalg.shift_invert import shifted_factor
from milora_init.methods import MODES, Mode

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_OF_A_LIBRARY = re.compile("CUSOLVER_|CUBLAS_|cusolver error|cublas error|MAGMA", re.IGNORECASE)
_OUT_OF_MEMORY = re.compile("(CUSOLVER|CUBLAS)_STATUS_ALLOC_FAILED|CUDA error: out of memory")
TOLERANCE = 5e-8  # of the certified component error, an upper estimate: the true one is mostly far below
_ANGLES = (4.0, 0.04)  # times the tolerance: where the Krylov loop stops, and where the second attempt does
_UNSCALED_EXPONENT = 16  # entries within 2^-16 and 2^16 are not scaled
_NULL = 100 * EPS  # times s_max: below it a singular value is rounding error
_SMALL = EPS**0.5  # times s_max: below it X v / s has lost half its digits or more


@dataclass(frozen=True, slots=True)
class Triplets:
    """U (m, r), s (r,) descending, V (n, r), all float64 on the device of W, and their certificate.

    s_max is the largest singular value of W. By the algorithm "lanczos" in mode "min" it is an estimate from below, to
    a percent on trained weights and a tenth on a flat spectrum.
    """

    U: Tensor
    s: Tensor
    V: Tensor
    s_max: float
    certificate: Certificate


def singular_triplets(
    W: Tensor,
    r: int,
    *,
    mode: Mode = "min",
    seed: int = 0,
    tolerance: float = TOLERANCE,
    arithmetic: DeviceArithmetic | None = None,
) -> Triplets:
    """The r singular triplets of W that `mode` names, s descending, with a certificate.

    In every column of V the entry of largest magnitude is positive.

    Args:
        W: (m, n), of any floating dtype, on any device. For a device without float64 the result is on the CPU.
        r: 1 <= r <= min(m, n).
        mode: Which part of the spectrum.
        seed: Draws the indices of mode "random", and the columns of U where s is zero.
        tolerance: The largest certified component error that is accepted.
        arithmetic: The algorithms to use; None for those of W's device.

    Raises:
        ValueError: W is not a floating-point matrix, has NaN or Inf entries, r is out of range; or no algorithm
            converges, not even the full SVD.
        torch.OutOfMemoryError: The device's memory is too small.
    """
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(f"W is {W.dtype} of shape {tuple(W.shape)}, expected a floating-point matrix")
    q = min(W.shape)
    if not 1 <= r <= q:
        raise ValueError(f"r is {r}, expected 1 to {q} for a matrix of shape {tuple(W.shape)}")
    X = readable(W, arithmetic)
    wanted = wanted_indices(q, r, mode, seed).to(X.stored.device)

    solution, certificate = _solve(X, wanted, mode, seed, tolerance)
    left, right = _signed(solution.left, solution.right, wide=W.shape[0] < W.shape[1])
    unit = math.ldexp(1.0, X.exponent)
    return Triplets(left, solution.s * unit, right, solution.s_max * unit, certificate)


def triplets_of_batch(
    W: Tensor, r: int, *, mode: Mode, tolerance: float = TOLERANCE, arithmetic: DeviceArithmetic | None = None
) -> list[Triplets | None]:
    """The triplets of each of a batch of weights W (b, m, n), all found by the calls that one weight takes.

    Only the first algorithm of a GPU does this.

    Returns:
        For each weight its triplets, as `singular_triplets` describes them. None for a weight that has to be solved
        alone: its entries need scaling, or are not finite, or mixed precision does not solve it.

    Raises:
        torch.OutOfMemoryError: The device's memory is too small.
    """
    arithmetic = arithmetic or arithmetic_of(W.device)
    (b, m, n), q = W.shape, min(W.shape[1:])
    found: list[Triplets | None] = [None] * b
    if arithmetic.mixed_precision != "subspace" or not uses_krylov(max(m, n), q, r, mode, gpu=True):
        return found
    largest = torch.stack([W.amin(dim=(1, 2)).neg(), W.amax(dim=(1, 2))]).amax(dim=0).tolist()
    usable = [item for item, entry in enumerate(largest) if math.isfinite(entry) and _exponent(entry) == 0]
    if not usable:
        return found
    W = W if len(usable) == b else W[usable]
    X = BlockedMatrix(W.mT if m < n else W, 0, arithmetic)
    try:
        with library_failures():
            results = extreme_triplets(X, r, tolerance, largest=mode == "max")
    except (NotConverged, LibraryFailure):
        return found
    solved = {
        item: result for item, result in zip(usable, results, strict=True) if not isinstance(result, NotConverged)
    }
    if solved:
        sides = zip(*((solution.left, solution.right) for solution, _ in solved.values()), strict=True)
        U, V = _signed(*(torch.stack(vectors) for vectors in sides), wide=m < n)
        for number, (item, (solution, certificate)) in enumerate(solved.items()):
            found[item] = Triplets(U[number], solution.s, V[number], solution.s_max, certificate)
    return found


def readable(W: Tensor, arithmetic: DeviceArithmetic | None = None) -> BlockedMatrix:
    """W (m, n) as the algorithms read it: upright (p, q), p >= q, and scaled. On the CPU if W's device has no float64.

    Raises:
        ValueError: W has NaN or Inf entries.
    """
    W = W.detach()
    arithmetic = arithmetic or arithmetic_of(W.device)
    if W.device.type == "mps":
        W = W.cpu()
    low, high = torch.stack(torch.aminmax(W)).tolist()
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"W of shape {tuple(W.shape)} has NaN or Inf entries")
    return BlockedMatrix(W.mT if W.shape[0] < W.shape[1] else W, _exponent(max(-low, high)), arithmetic)


def _exponent(largest: float) -> int:
    """Of the power of two that brings entries up to `largest` near 1, exactly; 0 where they are near enough.

    So no square over- or underflows, not even in float32. The entries of a language model are near enough.
    """
    exponent = math.frexp(largest)[1]
    return 0 if abs(exponent) <= _UNSCALED_EXPONENT else exponent


def wanted_indices(q: int, r: int, mode: Mode, seed: int) -> Tensor:
    """The indices (r,), ascending, into a descending spectrum of q values that `mode` asks for.

    Raises:
        ValueError: No such mode.
    """
    if mode == "min":
        return torch.arange(q - r, q)
    if mode == "max":
        return torch.arange(r)
    if mode == "mid":
        start = (q - r) // 2
        return torch.arange(start, start + r)
    if mode == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(q, generator=generator)[:r].sort().values
    raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")


def _solve(X: BlockedMatrix, wanted: Tensor, mode: Mode, seed: int, tolerance: float) -> tuple[Solution, Certificate]:
    """The triplets of X at the indices `wanted` (r,), by the first algorithm whose solution is accepted."""
    (p, q), r = X.shape, wanted.numel()
    if uses_krylov(p, q, r, mode, gpu=X.arithmetic.crossing == "gpu"):
        attempts: list[Callable[[], tuple[Solution, Certificate]]] = [lambda: krylov_triplets(X, r, mode, tolerance)]
        if X.arithmetic.float32_first(p * q, mode):
            attempts.insert(0, lambda: _float32_first(X, r, mode, tolerance))
        failures: list[str] = []
        for attempt in attempts:
            try:
                with library_failures():
                    solution, certificate = attempt()
                return solution, replace(certificate, reason="; ".join([*failures, certificate.reason]))
            except (NotConverged, LibraryFailure) as failure:
                failures.append(str(failure))
        reason = "; ".join(failures)
    elif mode in ("min", "max"):
        reason = f"all eigenvectors cost less for r = {r} of q = {q}"
    else:
        reason = f"mode {mode} needs interior triplets"
    try:
        with library_failures():
            solution, certificate = _by_eigh(X, wanted, seed, reason)
        if is_accepted(solution, certificate, tolerance):
            return solution, certificate
        reason = f"{reason}; {_too_far('eigh', certificate)}"
    except LibraryFailure as failure:
        reason = f"{reason}; eigh failed: {failure}"
    try:
        with library_failures():
            return _by_svd(X, wanted, reason)
    except LibraryFailure as failure:
        raise ValueError(f"no algorithm converges on it: {reason}; svd failed: {failure}") from failure


def _float32_first(X: BlockedMatrix, r: int, mode: Mode, tolerance: float) -> tuple[Solution, Certificate]:
    """The r smallest or largest triplets of X (p, q), sought in float32. Raises NotConverged."""
    if X.arithmetic.mixed_precision == "lanczos":
        return corrected_triplets(X, r, tolerance, largest=mode == "max")
    of_one = replace(X, stored=X.stored.unsqueeze(0))
    (found,) = extreme_triplets(of_one, r, tolerance, largest=mode == "max")
    if isinstance(found, NotConverged):
        raise found
    return found


class LibraryFailure(Exception):  # noqa: N818  the next algorithm is tried
    """LAPACK or a library of the device failed; the text is the first line of its own."""


@contextmanager
def library_failures() -> Iterator[None]:
    """Raise `LibraryFailure` for what a library of linear algebra raises, and no other RuntimeError.

    Where a library of a GPU lacks memory, torch may raise a plain RuntimeError: it becomes a torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = str(error)
        if _OUT_OF_MEMORY.search(text):
            raise torch.OutOfMemoryError(text) from error
        if not (isinstance(error, LinAlgError) or _OF_A_LIBRARY.search(text)):
            raise
        raise LibraryFailure(text.partition("\n")[0]) from error


def _too_far(path: str, certificate: Certificate) -> str:
    error = math.inf if certificate.component_error is None else certificate.component_error
    return f"{path} left a component error of {error:.1e}"


def krylov_triplets(
    X: BlockedMatrix, r: int, mode: Mode, tolerance: float, gram: Tensor | None = None
) -> tuple[Solution, Certificate]:
    """The r smallest or largest triplets of X (p, q), from a Krylov space.

    `gram` is the lower triangle of X^T X (q, q), if it is known; for the smallest triplets it is overwritten.

    Raises:
        NotConverged: No solution is accepted.
    """
    q, arithmetic = X.shape[1], X.arithmetic
    block = arithmetic.krylov_block
    factor, shift = shifted_factor(X, gram) if mode == "min" else (None, 0.0)
    apply = X.gram_operator(10 * r + 150) if factor is None else factor.solve
    for angle in _ANGLES:
        pairs = largest_eigenpairs(
            apply,
            q,
            r,
            block=block,
            max_basis=min(q - 2 * block, 16 * r + 768),
            tolerance=angle * tolerance,
            arithmetic=arithmetic,
            device=X.stored.device,
        )
        if not spectral_norm(pairs.probe.cpu()) < float(pairs.values[-1]):
            raise NotConverged("an independent block found what the Krylov space had missed")
        basis = pairs.vectors
        for refined in ("", ", refined"):
            reason = f"r = {r} of q = {q}, {pairs.steps} steps of {block}{refined}"
            solution, gaps = _from_basis(X, basis, pairs, factor, shift, reason)
            certificate = certify(X, solution, gaps)
            if is_accepted(solution, certificate, tolerance):
                return solution, certificate
            largest_first = solution.right if factor is None else solution.right.flip(1)
            basis = _refined(apply, largest_first, arithmetic)
    raise NotConverged(_too_far("lanczos", certificate))


def _from_basis(
    X: BlockedMatrix, basis: Tensor, pairs: RitzPairs, factor: CholeskyFactor | None, shift: float, reason: str
) -> tuple[Solution, Gaps]:
    """The solution within a basis (q, r) of eigenvectors, and its gaps.

    factor is that of X^T X - shift I for the smallest triplets, None for the largest.
    """
    left, s, right, image = rayleigh_ritz(X, basis)
    s_max = float(s[0]) if factor is None else math.sqrt(_largest(X, factor) + shift)
    next_eigenvalue = pairs.next_value if factor is None else shift + 1 / pairs.next_value
    nearest = torch.full_like(s, next_eigenvalue).sqrt()
    solution = Solution(
        left,
        s,
        right,
        image,
        s_max,
        path="lanczos",
        reason=reason,
        complete="an independent block found nothing beyond the cut",
        inverse=None if factor is None else factor.solve,
    )
    return solution, Gaps(nearest, (s - nearest).abs())


def _refined(apply: Operator, basis: Tensor, arithmetic: DeviceArithmetic) -> Tensor:
    """A basis (q, r) of eigenvectors, the largest eigenvalue's first, after one more application of the operator.

    Where its eigenvalues span many orders of magnitude, rounding in the projected operator leaves in each vector a
    little of those far beyond the cut. An application of the operator damps exactly these.
    """
    image = apply(basis)
    return arithmetic.orthonormalise(image / image.norm(dim=0).clamp_min(1e-300))[0]


def _largest(X: BlockedMatrix, factor: CholeskyFactor) -> float:
    """An estimate of the largest eigenvalue of the factored matrix: it is only a scale."""
    device, q = X.stored.device, X.shape[1]
    projection = power_projection(factor.times, q, arithmetic=X.arithmetic, device=device, dtype=torch.float64)
    return float(largest_eigenvalues(projection)[0])


def _by_eigh(X: BlockedMatrix, wanted: Tensor, seed: int, reason: str) -> tuple[Solution, Certificate]:
    """The triplets at the indices `wanted` (r,), from all eigenvectors of the Gram matrix."""
    eigenvalues, vectors = torch.linalg.eigh(X.gram())
    spectrum = eigenvalues.clamp_(min=0).sqrt_().flip(0)
    vectors = vectors.flip(1)
    left, s, right, image = rayleigh_ritz(X, vectors[:, wanted])
    s_max = max(float(spectrum[0]), float(s[0]))
    if bool((s <= _SMALL * s_max).any()):
        left = _orthogonal_to_range(X, left, s, spectrum, vectors, seed)
    spectrum[wanted] = s
    solution = Solution(left, s, right, image, s_max, path="eigh", reason=reason, complete="all computed")
    return solution, certify(X, solution, gaps_in(spectrum, wanted))


def _by_svd(X: BlockedMatrix, wanted: Tensor, reason: str) -> tuple[Solution, Certificate]:
    """The triplets at the indices `wanted` (r,), from a full SVD of X."""
    full = X.to_float64()
    left, spectrum, right = torch.linalg.svd(full, full_matrices=False)
    del full
    left, s, right = left[:, wanted], spectrum[wanted], right.mT[:, wanted]
    image = X.times(right)
    solution = Solution(left, s, right, image, float(spectrum[0]), path="svd", reason=reason, complete="all computed")
    return solution, certify(X, solution, gaps_in(spectrum, wanted))


def rayleigh_ritz(X: BlockedMatrix, basis: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The triplets of X within an orthonormal basis (q, k): left (p, k), s (k,), right (q, k), X right (p, k)."""
    return rotated(X.times(basis), basis)


def _orthogonal_to_range(
    X: BlockedMatrix, left: Tensor, s: Tensor, spectrum: Tensor, vectors: Tensor, seed: int
) -> Tensor:
    """The left vectors (p, r), made orthogonal to X times the unwanted right vectors where s (r,) is small.

    Where s is near 0, X v / s is rounding error. Any unit vector that X^T maps to zero serves, so a random one takes
    its place, made orthogonal to the images of all other right vectors. spectrum (q,) and vectors (q, q) are all the
    singular values of X, descending, and its right vectors.
    """
    s_max = float(spectrum[0])
    null = s <= _NULL * s_max
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(left.shape, generator=generator, dtype=torch.float64).to(left.device)
    left = torch.where(null, noise, left)
    # Below this an eigenvalue of G may be rounding error, and its inverse would be noise.
    strong = spectrum > 1e-6 * s_max
    right, inverse = vectors[:, strong], spectrum[strong].pow(-2).unsqueeze(1)
    small = s <= _SMALL * s_max
    for _ in range(3):
        weak = left[:, small]
        weak = weak - X.times(right @ (inverse * (right.mT @ X.transposed_times(weak))))
        left[:, small] = weak / weak.norm(dim=0).clamp_min(1e-300)
        # QR keeps the leading columns, which are those with the larger s.
        Q, R = torch.linalg.qr(left)
        left = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
    return left


def _signed(left: Tensor, right: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """U and V (..., k, r) of W from the singular vectors of X, which is W's transpose if W is wide, with their signs.

    In each column of V the entry of largest magnitude is positive. Entries within 1e-6 of the largest count as equal
    and the first one decides, so that the last bit does not.
    """
    U, V = (right, left) if wide else (left, right)
    size = V.abs()
    first = (size >= (1 - 1e-6) * size.amax(dim=-2, keepdim=True)).to(torch.uint8).argmax(dim=-2, keepdim=True)
    sign = torch.where(V.gather(-2, first) < 0, -1.0, 1.0).to(V.dtype)
    return U * sign, V * sign
