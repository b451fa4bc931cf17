"""The source of the noise: a generator of a device's numbers, in a state the operating system's entropy fills.

On CPU, torch draws from the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998). `manual_seed` uses 32 bits of its
argument, so noise of one large tensor would tell which of the 4 billion streams it came from; here all 624 words of the
state are filled. CUDA draws from Philox 4x32-10 (Salmon et al., 2011), whose key is the 64 bits of the seed.
Neither is a cryptographic generator.

**Not hardened.** The guarantee is that of noise that is a real number, and what is added is a float. Known attacks on
that are not defended against: the low bits of a noised value tell which values it can have come from (Mironov, CCS
2012, "On significance of the least significant bits for differential privacy"), for Gaussian noise too, and so does the
time that drawing takes (Jin et al., S&P 2022, arXiv 2112.05307); the precision of the sum tells in the same way (Haney
et al., 2022, arXiv 2207.13793). They need the exact gradients or weights that were released, or a clock at the machine.
Who has to withstand them needs discrete noise on integers.
"""

import numpy as np
import torch

from dit_dp.clipping.hardware import hardware

MT19937_WORDS = 624
_WORDS_AT = 24  # in `torch.Generator.get_state()` on CPU: seed, left, seeded, next; then the words, 8 bytes each


def entropy_size(device: torch.device) -> int:
    """Return the number of bytes that `generator_of` takes on a device."""
    return 4 * MT19937_WORDS if device.type == "cpu" else 8


def generator_of(entropy: bytes, device: torch.device) -> torch.Generator:
    """Return a generator whose state is determined by all bits of `entropy`.

    Args:
        entropy: `entropy_size(device)` uniform random bytes.
        device: Where the numbers will be drawn.
    """
    if len(entropy) != entropy_size(device):
        raise ValueError(f"entropy: got {len(entropy)} bytes; expected {entropy_size(device)} for {device}")
    generator = torch.Generator(device=device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(entropy, "little"))
    words = np.frombuffer(entropy, dtype="<u4").astype(np.uint64)
    with hardware().with_data():
        state = generator.manual_seed(0).get_state().numpy().copy()  # freshly seeded: words are twisted before use
        state[_WORDS_AT : _WORDS_AT + words.nbytes] = words.view(np.uint8)
        generator.set_state(torch.from_numpy(state))
    return generator


def state_of(generator: torch.Generator) -> bytes:
    """Return a generator's whole state."""
    with hardware().with_data():
        return generator.get_state().numpy().tobytes()
