"""The public functions of all losses. Importing a loss registers it, in the order in which they are listed to users."""

# isort: off
from xtoken.losses.pkl import linear_pkl_loss, pkl_loss
from xtoken.losses.hkl import hkl_loss, linear_hkl_loss
from xtoken.losses.gold import gold_loss, linear_gold_loss
from xtoken.losses.uld import linear_uld_loss, uld_loss
from xtoken.losses.kd import kd_loss, linear_kd_loss
from xtoken.losses.prefix_kl import linear_prefix_kl_loss, prefix_kl_loss
from xtoken.losses.alm import alm_loss, linear_alm_loss
from xtoken.losses.bpm import bpm_loss, linear_bpm_loss
from xtoken.losses.escd import escd_loss, linear_escd_loss
from xtoken.losses.nemo_events import linear_nemo_events_loss, nemo_events_loss
from xtoken.losses.one_to_one import linear_one_to_one_loss, one_to_one_loss
from xtoken.losses.simct import linear_simct_loss, simct_loss
# isort: on

__all__ = [
    "alm_loss",
    "bpm_loss",
    "escd_loss",
    "gold_loss",
    "hkl_loss",
    "kd_loss",
    "linear_alm_loss",
    "linear_bpm_loss",
    "linear_escd_loss",
    "linear_gold_loss",
    "linear_hkl_loss",
    "linear_kd_loss",
    "linear_nemo_events_loss",
    "linear_one_to_one_loss",
    "linear_pkl_loss",
    "linear_prefix_kl_loss",
    "linear_simct_loss",
    "linear_uld_loss",
    "nemo_events_loss",
    "one_to_one_loss",
    "pkl_loss",
    "prefix_kl_loss",
    "simct_loss",
    "uld_loss",
]
