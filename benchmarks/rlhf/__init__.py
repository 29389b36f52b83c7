"""DPO beside RLHF: the same base, openings, reward and measures."""
