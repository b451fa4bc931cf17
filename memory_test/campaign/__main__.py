"""``python -m memory_test.campaign``: parse, call, exit."""

import sys
import warnings

from dit_dp.console import guarded
from memory_test.campaign.args import CampaignArgs
from memory_test.campaign.campaign import run_campaign

NAME = "gpu-campaign"

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus's, in predictions
    stopped = "interrupted; what was finished is kept"
    sys.exit(guarded(CampaignArgs, None, NAME, run_campaign, name=NAME, interrupted=stopped))
