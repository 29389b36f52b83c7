"""Row -> records: one row of any known layout becomes preference pairs or labelled completions."""
