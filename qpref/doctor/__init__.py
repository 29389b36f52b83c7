"""What on this machine keeps qpref from training, or makes it slow, each with its fix: for `qpref doctor`"""
