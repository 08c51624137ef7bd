"""What an episode is made of, and what each objective would learn from it: RFC 010's accounting.

``account_of`` counts an episode's tokens by who made them, and with log-probabilities of one forward pass gives the
loss of ordinary RL, of ECHO, and of the world term alone.
"""

from backtalk.evidence.account.characters import recounted, transcribed
from backtalk.evidence.account.ledger import KINDS, Kind, Stretch, Tally, stretches, tally
from backtalk.evidence.account.losses import Loss, advantages_of, as_if_sampled, three_losses
from backtalk.evidence.account.report import Account, account_of, total_of

__all__ = [
    "KINDS",
    "Account",
    "Kind",
    "Loss",
    "Stretch",
    "Tally",
    "account_of",
    "advantages_of",
    "as_if_sampled",
    "recounted",
    "stretches",
    "tally",
    "three_losses",
    "total_of",
    "transcribed",
]
