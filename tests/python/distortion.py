"""Exact distortion of the optimal quantiser of a unit vector's coordinate in R^d, times d.

Reference figures, found apart from the library's solver; dimension None is the Gaussian limit.
"""

#: Dimension -> bits -> squared error at unit variance.
EXACT_DISTORTION = {
    64: {
        1: 0.358387361,
        2: 0.114525757,
        3: 0.0333908341,
        4: 0.00913151760,
        5: 0.00239922715,
        8: 3.93167870e-5,
    },
    128: {
        1: 0.360888594,
        2: 0.116000070,
        3: 0.0339659258,
        4: 0.00931478795,
        5: 0.00245146016,
        8: 4.02411555e-5,
    },
    256: {
        1: 0.362135618,
        2: 0.116740039,
        3: 0.0342560036,
        4: 0.00940752943,
        5: 0.00247794224,
        8: 4.07106713e-5,
    },
    None: {
        1: 0.363380228,
        2: 0.117481848,
        3: 0.0345477608,
        4: 0.00950100801,
        5: 0.00250466836,
        8: 4.11850829e-5,
    },
}
