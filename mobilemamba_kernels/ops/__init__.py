"""The operators, one file each: public function, checks, reference, schema."""
