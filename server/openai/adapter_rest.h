// AdapterService as resources under /v1/adapters. Bodies, queries and answers have the fields of
// lorikeet.v1's messages; a name in the path is not in the body.
#pragma once

#include "server/adapter_admin.h"
#include "server/openai/http_call.h"

namespace lorikeet::rest {

HttpOutcome ListAdapters(AdapterAdmin& admin, const HttpCall& call);     // GET /v1/adapters?...
HttpOutcome LoadAdapter(AdapterAdmin& admin, const HttpCall& call);      // POST /v1/adapters
HttpOutcome GetAdapter(AdapterAdmin& admin, const HttpCall& call);       // GET .../{name}
HttpOutcome UnloadAdapter(AdapterAdmin& admin, const HttpCall& call);    // DELETE .../{name}?...
HttpOutcome ReloadAdapter(AdapterAdmin& admin, const HttpCall& call);    // POST .../{name}/reload
HttpOutcome PinAdapter(AdapterAdmin& admin, const HttpCall& call);       // POST .../{name}/pin
HttpOutcome PrefetchAdapter(AdapterAdmin& admin, const HttpCall& call);  // POST .../{name}/prefetch
HttpOutcome SetAlias(AdapterAdmin& admin, const HttpCall& call);         // POST .../{name}/alias
HttpOutcome PlanCapacity(AdapterAdmin& admin, const HttpCall& call);     // POST /v1/plan_capacity

}  // namespace lorikeet::rest
