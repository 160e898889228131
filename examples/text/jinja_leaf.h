/// The smallest expressions: names, literals and the arguments of a call.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "examples/text/jinja_runtime.h"

namespace graft::text::jinja {

/// The arguments of a call as they stand in the template.
struct CallSite {
  std::vector<Expression> positional;
  std::vector<std::pair<std::string, Expression>> named;
  int line = 0;

  Arguments evaluate(Scope& scope) const;
};

/// A name, or one of the constants true, false and none.
Expression parse_name(TokenStream& tokens);

/// A string literal; neighbours are joined.
Expression parse_string(TokenStream& tokens);

/// An integer or a float.
Expression parse_number(TokenStream& tokens);

/// A list or tuple of what `items` give.
Expression list_of(std::vector<Expression> items, bool is_tuple);

/// A mapping; its keys must turn out to be strings.
Expression dict_of(std::vector<std::pair<Expression, Expression>> members, int line);

}  // namespace graft::text::jinja
