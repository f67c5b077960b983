// The version of the library: the only place where it is written.
#pragma once

#define TQ_VERSION_MAJOR 0
#define TQ_VERSION_MINOR 1
#define TQ_VERSION_PATCH 0
#define TQ_VERSION_STRING "0.1.0"

namespace turboquant {

// The version the linked library was built from (the headers' is TQ_VERSION_STRING).
const char* version();

}  // namespace turboquant
