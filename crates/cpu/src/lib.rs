//! The CPU backend: one arithmetic order on AMX, AVX-512, AVX2 and scalar paths.
