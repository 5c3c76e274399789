#pragma once

#include "include/capability.h"
#include "include/haar.h"

DECLARE_KERNEL(haar_idwt2d, HaarParams)
