//! Calls: macros, loops that call themselves, methods, and the functions that are always there.

use std::cell::Cell;
use std::rc::Rc;

use super::super::meter::{Meter, Writer};
use super::super::render::Renderer;
use super::super::syntax::{Arguments, Expr};
use super::super::value::{Function, Loop, Object, Range, Value, share_dict, share_items};
use super::super::{Failure, check_name, methods, operate, short};
use super::{Found, Given};

/// Numbers of one `range`: the sandbox's.
const MAX_RANGE: usize = 100_000;

/// Pays for a dict's entries before they are copied.
fn charge_entries(meter: &Meter, len: usize) -> Result<(), Failure> {
    meter.spend(1 + len)?;
    meter.room(len.saturating_mul(size_of::<(Value, Value)>()))
}

impl<'p> Renderer<'p> {
    /// Calls what `callee` is; a call block gives its `caller`.
    pub(in super::super) fn eval_call(
        &mut self,
        callee: &'p Expr,
        arguments: &'p Arguments,
        caller: Option<Value>,
    ) -> Result<Value, Failure> {
        let function = match callee {
            Expr::Attribute(object, name) => {
                let object = self.eval(object)?;
                match self.attribute(&object, name)? {
                    Found::Value(value) => value,
                    Found::Method => {
                        let mut given = self.eval_arguments(arguments)?;
                        given.keyword.extend(caller.map(|caller| ("caller".into(), caller)));
                        return methods::call(self, &object, name, given);
                    }
                }
            }
            _ => self.eval(callee)?,
        };
        let mut given = self.eval_arguments(arguments)?;
        given.keyword.extend(caller.map(|caller| ("caller".into(), caller)));
        self.call(&function, given)
    }

    fn call(&mut self, function: &Value, given: Given) -> Result<Value, Failure> {
        let object = match function {
            Value::Object(object) => object,
            Value::Undefined(words) => return Err(Failure::new(words.to_string())),
            _ => {
                let kind = function.type_name();
                return Err(Failure::new(format!("{kind:?} object is not callable")));
            }
        };
        match &***object {
            Object::Macro(found) => {
                let (index, scope) = (found.index, found.scope);
                self.scoped_in(scope, |renderer| renderer.call_macro(index, given))
            }
            Object::Method { object, name } => methods::call(self, object, name, given),
            Object::Function(function) => self.call_function(*function, given),
            Object::Loop(state) => self.call_loop(state, given),
            Object::Joiner { separator, used } => {
                given.bind("joiner", [])?;
                if used.replace(true) { Ok(separator.clone()) } else { self.text("") }
            }
            _ => {
                let kind = function.type_name();
                Err(Failure::new(format!("{kind:?} object is not callable")))
            }
        }
    }

    /// A text as a value.
    pub(in super::super) fn text(&self, text: impl Into<String>) -> Result<Value, Failure> {
        Value::text(&self.meter, text)
    }

    /// Runs a macro in the scope just made for it.
    fn call_macro(&mut self, index: usize, given: Given) -> Result<Value, Failure> {
        let called = &self.program.macros[index];
        let name = &called.name;
        let Given { positional, mut keyword } = given;
        let mut positional = positional.into_iter();
        let mut caller_given = false;
        for (symbol, default) in &called.parameters {
            let parameter = &*self.program.names[*symbol as usize];
            let by_name = |keyword: &mut Vec<(Rc<str>, Value)>| {
                let place = keyword.iter().position(|(other, _)| &**other == parameter)?;
                Some(keyword.remove(place).1)
            };
            let value = match positional.next() {
                Some(value) => Some(value),
                None => by_name(&mut keyword),
            };
            caller_given |= parameter == "caller";
            let value = match (value, default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(default)?,
                (None, None) => {
                    let parameter = short(parameter);
                    Value::undefined(format!("parameter {parameter:?} was not provided"))
                }
            };
            self.store(*symbol, value)?;
        }
        if called.takes.caller && !caller_given {
            let place = keyword.iter().position(|(name, _)| &**name == "caller");
            let caller = place.map(|place| keyword.remove(place).1);
            let caller = caller.unwrap_or_else(|| Value::undefined("No caller defined"));
            self.store_named("caller", caller)?;
        }
        if called.takes.kwargs {
            let mut entries = Vec::with_capacity(keyword.len());
            for (name, value) in keyword {
                entries.push((self.text(&*name)?, value));
            }
            let kwargs = Value::dict(&self.meter, entries)?;
            self.store_named("kwargs", kwargs)?;
        } else if let Some((other, _)) = keyword.first() {
            return Err(Failure::new(format!("macro {name:?} takes no argument {other:?}")));
        }
        if called.takes.varargs {
            let varargs = Value::tuple(&self.meter, positional.collect())?;
            self.store_named("varargs", varargs)?;
        } else if positional.next().is_some() {
            let most = called.parameters.len();
            return Err(Failure::new(format!(
                "macro {name:?} takes not more than {most} arguments"
            )));
        }
        let mut out = Writer::new(&self.meter);
        self.body(&called.body, &mut out)?;
        self.text(out.finish())
    }

    fn store_named(&mut self, name: &str, value: Value) -> Result<(), Failure> {
        let place = self.program.names.iter().position(|other| &**other == name);
        self.meter.spend(self.program.names.len() / 16)?;
        match place {
            Some(symbol) => self.store(symbol as u32, value),
            None => Ok(()),
        }
    }

    /// `loop(items)`.
    fn call_loop(&mut self, state: &Loop, given: Given) -> Result<Value, Failure> {
        let Some((index, scope)) = state.recursive else {
            let message = "the loop must have the 'recursive' marker to be called recursively";
            return Err(Failure::new(message));
        };
        let [items] = given.bind("loop", ["iterable"])?;
        let items = items.ok_or_else(|| Failure::new("loop takes one argument"))?;
        let depth0 = state.depth0 + 1;
        let mut out = Writer::new(&self.meter);
        let program = self.program;
        self.scoped_in(scope, |renderer| {
            let recursive = Some((index, scope));
            renderer.repeat(&program.loops[index], &items, depth0, recursive, &mut out)
        })?;
        self.text(out.finish())
    }

    fn call_function(&mut self, function: Function, given: Given) -> Result<Value, Failure> {
        match function {
            Function::Range => self.range(given),
            Function::Dict => {
                let entries = self.dict_entries(given)?;
                Value::dict(&self.meter, entries)
            }
            Function::Namespace => {
                let entries = self.dict_entries(given)?;
                let dict = share_dict(&self.meter, entries)?;
                let mut attributes = Vec::with_capacity(dict.entries.len());
                for (name, value) in &dict.entries {
                    let Some(name) = name.as_str() else {
                        return Err(Failure::new("a namespace's names must be strings"));
                    };
                    check_name(name)?;
                    attributes.push((name.into(), value.clone()));
                }
                self.namespace(attributes)
            }
            Function::Cycler => {
                let Given { positional, keyword } = given;
                if positional.is_empty() || !keyword.is_empty() {
                    return Err(Failure::new("at least one item has to be provided"));
                }
                let items = share_items(&self.meter, positional)?;
                Value::object(&self.meter, Object::Cycler { items, at: Cell::new(0) })
            }
            Function::Joiner => {
                let [separator] = given.bind("joiner", ["sep"])?;
                let separator = separator.map_or_else(|| self.text(", "), Ok)?;
                if separator.as_str().is_none() {
                    return Err(Failure::new("a joiner takes a text"));
                }
                Value::object(&self.meter, Object::Joiner { separator, used: Cell::new(false) })
            }
            Function::RaiseException => {
                let [message] = given.bind("raise_exception", ["message"])?;
                let message = message.unwrap_or(Value::None);
                Err(Failure::Raised(operate::to_text(&self.meter, &message)?))
            }
            Function::StrftimeNow => {
                let [format] = given.bind("strftime_now", ["format"])?;
                let format = format.as_ref().and_then(Value::as_str);
                let format = format.ok_or_else(|| Failure::new("strftime_now takes a text"))?;
                let mut out = Writer::new(&self.meter);
                for part in crate::text::strftime::parts(format, self.now_unix_s) {
                    out.push_str(&part.map_err(Failure::Error)?)?;
                }
                self.text(out.finish())
            }
        }
    }

    fn range(&mut self, given: Given) -> Result<Value, Failure> {
        let bounds: Option<Vec<i128>> = given.positional.iter().map(Value::as_int).collect();
        let (start, stop, step) = match bounds.as_deref() {
            Some([stop]) => (0, *stop, 1),
            Some([start, stop]) => (*start, *stop, 1),
            Some([start, stop, step]) if *step != 0 => (*start, *stop, *step),
            _ => return Err(Failure::new("range takes one to three integers, the step not zero")),
        };
        let distance = if step > 0 { stop.checked_sub(start) } else { start.checked_sub(stop) };
        let distance = distance.unwrap_or(i128::MAX).max(0) as u128;
        let len = distance.div_ceil(step.unsigned_abs());
        match usize::try_from(len) {
            Ok(len) if len <= MAX_RANGE => {
                Value::object(&self.meter, Object::Range(Range { start, stop, step, len }))
            }
            _ => {
                let message = format!("a range of {len} is too big, the limit is {MAX_RANGE}");
                Err(Failure::Limit(message))
            }
        }
    }

    /// The entries of `dict(…)`.
    fn dict_entries(&mut self, given: Given) -> Result<Vec<(Value, Value)>, Failure> {
        let mut entries = match given.positional.as_slice() {
            [] => Vec::new(),
            [Value::Dict(dict)] => {
                charge_entries(&self.meter, dict.entries.len())?;
                dict.entries.clone()
            }
            [pairs] => {
                let pairs = operate::items(&self.meter, pairs)?;
                charge_entries(&self.meter, pairs.len())?;
                let mut entries = Vec::with_capacity(pairs.len());
                for pair in pairs.iter() {
                    match operate::items(&self.meter, pair)?.items.as_slice() {
                        [key, value] => entries.push((key.clone(), value.clone())),
                        _ => return Err(Failure::new("dict takes pairs")),
                    }
                }
                entries
            }
            _ => return Err(Failure::new("dict takes at most one argument by place")),
        };
        for (name, value) in given.keyword {
            entries.push((self.text(&*name)?, value));
        }
        Ok(entries)
    }
}
