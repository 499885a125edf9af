"""What merge methods promise beyond what all of them do, and what some of them break.

Law: what a method declares; tests hold it to that, and to not keeping what it does not declare.
Breach: what it breaks of the laws that hold for all others.
"""

from __future__ import annotations

from typing import Literal

Law = Literal["identity", "copies", "homogeneous", "linear", "low-rank", "unbiased"]
Breach = Literal["gauge", "zeros"]
LAWS: dict[Law, str] = {
    "identity": "weights 1 and 0 give the first adapter",
    "copies": "k equal adapters at weights 1/k give that adapter",
    "homogeneous": "adapters c times as large give a result c times as large, c > 0",
    "linear": "the result is linear in the weights, while none of them is 0",
    "low-rank": "the result has at most the rank that was asked for",
    "unbiased": "the mean over seeds is the weighted sum",
}
BREACHES: dict[Breach, str] = {
    "gauge": "the same adapter in other factors (BG and G⁻¹A) gives another result",
    "zeros": "an adapter that changes nothing matters where one of its factors is not zero",
}
