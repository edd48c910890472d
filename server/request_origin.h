// What a request brings along for logs and traces.
#pragma once

#include <string>
#include <string_view>

namespace lorikeet {

struct RequestOrigin {
  std::string id;           // names the request in logs, traces and answers
  std::string traceparent;  // as it came; may be nothing of the kind
};

// `request_id`: the client's, which counts if it is 1 to 128 visible ASCII characters; else the
// request gets one of its own.
RequestOrigin MakeOrigin(std::string_view request_id, std::string_view traceparent);

}  // namespace lorikeet
