"""Findings of `qpref doctor`: what on this machine keeps qpref from training or slows it down, with the fixes."""
