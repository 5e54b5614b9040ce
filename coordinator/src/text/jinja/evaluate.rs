//! Evaluates expressions; what they call is in [`call`].

mod call;

use std::rc::Rc;

use super::meter::Writer;
use super::render::Renderer;
use super::syntax::{Arguments, Expr};
use super::value::{Loop, Object, Value, View};
use super::{Failure, check_name, checks, filters, names, operate, short, write};

/// What a call is given.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub(super) positional: Vec<Value>,
    pub(super) keyword: Vec<(Rc<str>, Value)>,
}

impl Given {
    /// The values of parameters `names`, given by place or by name.
    ///
    /// # Errors
    ///
    /// If one is given twice, or one that is not among them.
    pub(super) fn bind<const N: usize>(
        self,
        function: &str,
        names: [&str; N],
    ) -> Result<[Option<Value>; N], Failure> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            let found = self.positional.len();
            return Err(Failure::new(format!("{function} takes {N} arguments, not {found}")));
        }
        for (place, value) in bound.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.keyword {
            let place = names.iter().position(|other| *other == &*name && !other.is_empty());
            let Some(place) = place.map(|at| &mut bound[at]).filter(|place| place.is_none()) else {
                return Err(Failure::new(format!("{function} takes no argument {name:?}")));
            };
            *place = Some(value);
        }
        Ok(bound)
    }
}

/// What an attribute is.
pub(super) enum Found {
    Value(Value),
    /// A method of that name.
    Method,
}

impl<'p> Renderer<'p> {
    /// The value of an expression.
    pub(super) fn eval(&mut self, expr: &'p Expr) -> Result<Value, Failure> {
        self.deeper(|renderer| renderer.eval_here(expr))
    }

    fn eval_here(&mut self, expr: &'p Expr) -> Result<Value, Failure> {
        match expr {
            Expr::None => Ok(Value::None),
            Expr::Bool(value) => Ok(Value::Bool(*value)),
            Expr::Int(value) => Ok(Value::int(*value)),
            Expr::Float(value) => Ok(Value::Float(*value)),
            Expr::Text(text) => {
                self.meter.scan(text.len())?;
                Value::text(&self.meter, text.as_str())
            }
            Expr::Name(name) => self.load(*name),
            Expr::List(items) => {
                let items = self.eval_all(items)?;
                Value::list(&self.meter, items)
            }
            Expr::Tuple(items) => {
                let items = self.eval_all(items)?;
                Value::tuple(&self.meter, items)
            }
            Expr::Dict(entries) => self.eval_dict(entries),
            Expr::Attribute(object, name) => {
                let object = self.eval(object)?;
                self.attribute_value(&object, name)
            }
            Expr::Item(object, key) => self.eval_item(object, key),
            Expr::Slice(object, bounds) => self.eval_slice(object, bounds),
            Expr::Call(callee, arguments) => self.eval_call(callee, arguments, None),
            Expr::Filter(Some(value), name, arguments) => {
                let value = self.eval(value)?;
                self.filter(value, name, arguments)
            }
            Expr::Filter(None, ..) => Err(Failure::new("a filter without a value")),
            Expr::Test(value, name, arguments) => self.eval_test(value, name, arguments),
            Expr::Not(value) => Ok(Value::Bool(!self.eval(value)?.is_true())),
            Expr::Sign { negative, value } => operate::sign(&self.eval(value)?, *negative),
            Expr::Binary(op, sides) => {
                let left = self.eval(&sides[0])?;
                let right = self.eval(&sides[1])?;
                operate::binary(&self.meter, *op, &left, &right)
            }
            Expr::And(sides) => {
                let left = self.eval(&sides[0])?;
                if left.is_true() { self.eval(&sides[1]) } else { Ok(left) }
            }
            Expr::Or(sides) => {
                let left = self.eval(&sides[0])?;
                if left.is_true() { Ok(left) } else { self.eval(&sides[1]) }
            }
            Expr::Compare(first, others) => {
                let mut left = self.eval(first)?;
                for (op, right) in others {
                    let right = self.eval(right)?;
                    if !operate::holds(&self.meter, *op, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::Concat(parts) => self.eval_concat(parts),
            Expr::Condition { test, value, other } => {
                if self.eval(test)?.is_true() {
                    return self.eval(value);
                }
                match other {
                    Some(other) => self.eval(other),
                    None => Ok(Value::undefined(
                        "the inline if-expression evaluated to false and no else section was \
                         defined.",
                    )),
                }
            }
        }
    }

    fn eval_all(&mut self, exprs: &'p [Expr]) -> Result<Vec<Value>, Failure> {
        exprs.iter().map(|expr| self.eval(expr)).collect()
    }

    fn eval_dict(&mut self, entries: &'p [(Expr, Expr)]) -> Result<Value, Failure> {
        let mut values = Vec::with_capacity(entries.len());
        for (key, value) in entries {
            values.push((self.eval(key)?, self.eval(value)?));
        }
        Value::dict(&self.meter, values)
    }

    fn eval_item(&mut self, object: &'p Expr, key: &'p Expr) -> Result<Value, Failure> {
        let object = self.eval(object)?;
        let key = self.eval(key)?;
        self.item_value(&object, &key)
    }

    fn eval_slice(
        &mut self,
        object: &'p Expr,
        bounds: &'p [Option<Expr>; 3],
    ) -> Result<Value, Failure> {
        let object = self.eval(object)?;
        let mut values = [const { Value::None }; 3];
        for (value, bound) in values.iter_mut().zip(bounds) {
            if let Some(bound) = bound {
                *value = self.eval(bound)?;
            }
        }
        if let Value::Undefined(words) = &object {
            return Err(Failure::new(words.to_string()));
        }
        let [start, stop, step] = &values;
        let sliced = operate::slice(&self.meter, &object, [start, stop, step])?;
        let kind = object.type_name();
        sliced.ok_or_else(|| Failure::new(format!("{kind:?} object cannot be cut so")))
    }

    fn eval_concat(&mut self, parts: &'p [Expr]) -> Result<Value, Failure> {
        let mut out = Writer::new(&self.meter);
        for part in parts {
            let value = self.eval(part)?;
            write::str(&mut out, &value)?;
        }
        Value::text(&self.meter, out.finish())
    }

    fn eval_test(
        &mut self,
        value: &'p Expr,
        name: &str,
        arguments: &'p Arguments,
    ) -> Result<Value, Failure> {
        let value = self.eval(value)?;
        let given = self.eval_arguments(arguments)?;
        checks::holds(self, name, &value, given).map(Value::Bool)
    }

    fn filter(
        &mut self,
        value: Value,
        name: &str,
        arguments: &'p Arguments,
    ) -> Result<Value, Failure> {
        let given = self.eval_arguments(arguments)?;
        filters::call(self, name, value, given)
    }

    /// Passes a block's text through its filters.
    pub(super) fn eval_filters(
        &mut self,
        filters: &'p Expr,
        text: Value,
    ) -> Result<Value, Failure> {
        let Expr::Filter(inner, name, arguments) = filters else {
            return Err(Failure::new("a block's filter is none"));
        };
        let value = match inner {
            Some(inner) => self.deeper(|renderer| renderer.eval_filters(inner, text))?,
            None => text,
        };
        self.filter(value, name, arguments)
    }

    fn eval_arguments(&mut self, arguments: &'p Arguments) -> Result<Given, Failure> {
        let mut positional = self.eval_all(&arguments.positional)?;
        let mut keyword: Vec<(Rc<str>, Value)> = Vec::with_capacity(arguments.keyword.len());
        for (name, value) in &arguments.keyword {
            keyword.push((Rc::from(&**name), self.eval(value)?));
        }
        if let Some(more) = &arguments.more {
            let more = self.eval(more)?;
            let items = operate::items(&self.meter, &more)?;
            self.meter.spend(items.len())?;
            positional.extend(items.iter().cloned());
        }
        if let Some(more) = &arguments.more_keyword {
            let more = self.eval(more)?;
            let Value::Dict(dict) = &more else {
                return Err(Failure::new("argument after ** must be a mapping"));
            };
            for (name, value) in &dict.entries {
                let Some(name) = name.as_str() else {
                    return Err(Failure::new("keywords must be strings"));
                };
                check_name(name)?;
                self.meter.scan(name.len() + 64 * keyword.len())?;
                if keyword.iter().any(|(other, _)| &**other == name) {
                    let message = format!("got multiple values for keyword argument {name:?}");
                    return Err(Failure::new(message));
                }
                keyword.push((name.into(), value.clone()));
            }
        }
        Ok(Given { positional, keyword })
    }

    /// `object.name` as a value.
    pub(super) fn attribute_value(&mut self, object: &Value, name: &str) -> Result<Value, Failure> {
        match self.attribute(object, name)? {
            Found::Value(value) => Ok(value),
            Found::Method => {
                let object = Object::Method { object: object.clone(), name: name.into() };
                Value::object(&self.meter, object)
            }
        }
    }

    /// What `object.name` is.
    pub(super) fn attribute(&mut self, object: &Value, name: &str) -> Result<Found, Failure> {
        if let Value::Undefined(words) = object {
            return Err(Failure::new(words.to_string()));
        }
        let kind = object.type_name();
        if let Some(found) = self.own_attribute(object, name)? {
            return Ok(found);
        }
        if let Value::Dict(dict) = object {
            let key = self.text(name)?;
            if let Some(value) = dict.get(&self.meter, &key)? {
                return Ok(Found::Value(value.clone()));
            }
        }
        let name = short(name);
        let words = format!("'{kind} object' has no attribute '{name}'");
        Ok(Found::Value(Value::undefined(words)))
    }

    /// What Python's `getattr` finds.
    fn own_attribute(&mut self, object: &Value, name: &str) -> Result<Option<Found>, Failure> {
        let (methods, changes): (&[&str], &[&str]) = match object {
            Value::Text(_) => (&names::TEXT_METHODS, &[]),
            Value::List(_) => (&names::LIST_METHODS, &names::LIST_CHANGES),
            Value::Tuple(_) => (&names::TUPLE_METHODS, &[]),
            Value::Dict(_) => (&names::DICT_METHODS, &names::DICT_CHANGES),
            Value::Object(object) => match &***object {
                Object::Range(_) => (&names::TUPLE_METHODS, &[]),
                Object::Cycler { .. } => (&["next", "reset"], &[]),
                Object::Loop(_) => (&["cycle", "changed"], &[]),
                _ => (&[], &[]),
            },
            _ => (&[], &[]),
        };
        if methods.contains(&name) {
            return Ok(Some(Found::Method));
        }
        if changes.contains(&name) {
            let kind = object.type_name();
            let words = format!("access to attribute {name:?} of {kind:?} object is unsafe.");
            return Ok(Some(Found::Value(Value::undefined(words))));
        }
        let value = match object {
            Value::Tuple(items) if items.is_group => match name {
                "grouper" => Some(items[0].clone()),
                "list" => Some(items[1].clone()),
                _ => None,
            },
            Value::Object(object) => self.object_attribute(object, name)?,
            _ => None,
        };
        Ok(value.map(Found::Value))
    }

    fn object_attribute(&mut self, object: &Object, name: &str) -> Result<Option<Value>, Failure> {
        Ok(match object {
            Object::Namespace(attributes) => {
                let attributes = attributes.borrow();
                self.meter.look_up(name, attributes.iter().map(|(other, _)| &**other))?;
                let found = attributes.iter().find(|(other, _)| &**other == name);
                found.map(|(_, value)| value.clone())
            }
            Object::Loop(state) => loop_attribute(state, name),
            Object::Range(range) => match name {
                "start" => Some(Value::int(range.start)),
                "stop" => Some(Value::int(range.stop)),
                "step" => Some(Value::int(range.step)),
                _ => None,
            },
            Object::Macro(found) if name == "name" => {
                let name = &self.program.macros[found.index].name;
                Some(self.text(name.as_str())?)
            }
            Object::Cycler { items, at } if name == "current" => Some(items[at.get()].clone()),
            Object::Joiner { separator, .. } if name == "sep" => Some(separator.clone()),
            Object::Joiner { used, .. } if name == "used" => Some(Value::Bool(used.get())),
            _ => None,
        })
    }

    /// `object[key]` as a value.
    pub(super) fn item_value(&mut self, object: &Value, key: &Value) -> Result<Value, Failure> {
        if let Value::Undefined(words) = object {
            return Err(Failure::new(words.to_string()));
        }
        if let Some(found) = operate::item(&self.meter, object, key)? {
            return Ok(found);
        }
        if let Some(name) = key.as_str() {
            match self.own_attribute(object, name)? {
                Some(Found::Value(value)) => return Ok(value),
                Some(Found::Method) => return self.attribute_value(object, name),
                None => {}
            }
        }
        let kind = object.type_name();
        Ok(Value::undefined(format!("{kind} object has no such element")))
    }

    /// A view of a dict.
    pub(super) fn view(&self, kind: View, object: &Value) -> Result<Value, Failure> {
        let Value::Dict(dict) = object else {
            return Err(Failure::new("can only get item pairs from a mapping"));
        };
        Value::object(&self.meter, Object::View { kind, dict: Rc::clone(dict) })
    }
}

fn loop_attribute(state: &Loop, name: &str) -> Option<Value> {
    let (index0, len) = (state.index0.get(), state.items.len());
    let neighbour = |index: Option<usize>, words: &str| {
        let found = index.and_then(|index| state.items.get(index));
        found.cloned().unwrap_or_else(|| Value::undefined(words))
    };
    Some(match name {
        "index" => Value::count(index0 + 1),
        "index0" => Value::count(index0),
        "revindex" => Value::count(len - index0),
        "revindex0" => Value::count(len - index0 - 1),
        "first" => Value::Bool(index0 == 0),
        "last" => Value::Bool(index0 + 1 == len),
        "length" => Value::count(len),
        "depth" => Value::count(state.depth0 + 1),
        "depth0" => Value::count(state.depth0),
        "previtem" => neighbour(index0.checked_sub(1), "there is no previous item"),
        "nextitem" => neighbour(index0.checked_add(1), "there is no next item"),
        _ => return None,
    })
}
