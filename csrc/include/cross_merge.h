#pragma once

#include "include/capability.h"
#include "include/cross_scan.h"

DECLARE_KERNEL(cross_merge, CrossScanParams)
